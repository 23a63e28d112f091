"""Every option of a group is one row: its name in both fronts, its range, and whether torch has it."""

import inspect
import re
from typing import get_args

import numpy as np
import pytest
import rmsprop
import rmsprop.torch
import torch
from rmsprop import _core, types

ROWS = dict(_core.OPTIONS)
OF_OPTIMIZER = {"max_grad_norm", "nonfinite", "threads"}
OF_OPTIMIZER |= {"state_dtype", "rounding", "master_weight_bits", "seed"}
OF_TORCH = {"capturable", "foreach", "differentiable"}


def arguments(function):
    return set(inspect.signature(function).parameters) - {"self", "params"}


def test_the_array_front_has_them_all():
    assert arguments(rmsprop.RMSprop.__init__) == ROWS.keys() | OF_OPTIMIZER
    opt = rmsprop.RMSprop([np.ones(1)])
    assert opt.defaults.keys() == ROWS.keys()
    assert opt.param_groups[0].keys() == ROWS.keys() | {"params"}


def test_the_torch_front_has_them_all_and_torchs():
    own = ROWS.keys() | OF_OPTIMIZER | OF_TORCH
    assert arguments(rmsprop.torch.RMSprop.__init__) == own


def test_torchs_are_those_of_torch():
    torchs = {name for name, is_torchs in ROWS.items() if is_torchs}
    assert torchs == arguments(torch.optim.RMSprop.__init__) - OF_TORCH


def test_a_dialect_fixes_all_but_the_users():
    free = {"lr", "maximize", "contiguous_params", "clip_weights", "ema_decay"}
    free |= {"cautious_weight_decay", "corrected_weight_decay"}
    assert rmsprop.dialect("torch").keys() == ROWS.keys() - free


BAD = {"alpha": (-0.1, 1.1), "lr": (-1.0, np.inf), "eps": (-1e-9, np.nan)}


@pytest.mark.parametrize("name", ROWS)
def test_each_is_checked_by_its_name(name):
    """In the constructor, and in a group at the next step."""
    wrong = "x"
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected"):
        rmsprop.RMSprop([np.ones(1)], **{name: wrong})
    opt = rmsprop.RMSprop([np.ones(1)])
    for value in (wrong, *BAD.get(name, ())):
        opt.param_groups[0][name] = value
        with pytest.raises((TypeError, ValueError), match=rf"^{name} of group 0"):
            opt.step(grads=[np.ones(1)])
    assert opt.state[0]["step"] == 0


def test_types_for_checkers():
    """They are written down a second time, and the same."""
    with pytest.raises(ValueError, match="expected one of (.*), got") as error:
        rmsprop.dialect("none")
    names = re.search("one of (.*), got", str(error.value))[1].split(", ")
    assert list(get_args(types.Dialect)) == names
    options = rmsprop.dialect("torch")
    assert set(types.DialectOptions.__annotations__) == set(options)
    free = rmsprop.optimizer._FREE
    assert set(types.Overrides.__annotations__) == set(options) | free
    opt = rmsprop.RMSprop([np.ones(3)])
    for value in get_args(types.Nonfinite):
        opt.nonfinite = value
