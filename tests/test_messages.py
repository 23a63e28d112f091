"""Messages say what was meant; what has one meaning only is taken as that."""

import re

import numpy as np
import pytest
import rmsprop
import torch
from rmsprop.torch import RMSprop as TorchRMSprop


def optimizer(*params):
    return rmsprop.RMSprop(list(params) or [np.ones(3, np.float32)])


def test_gradients_as_closure():
    opt = optimizer()
    with pytest.raises(
        TypeError, match="closure: expected a function, got dict.*grads="
    ):
        opt.step({"w": np.ones(3)})
    assert opt.state[0]["step"] == 0


@pytest.mark.parametrize("scalar", [np.float32(1), np.float64(1), np.int64(1)])
def test_scalars_of_numpy_as_parameters(scalar):
    wanted = f"parameter 0: expected .*, got an immutable NumPy scalar ({type(scalar).__name__})"
    with pytest.raises(TypeError, match=re.escape(wanted).replace(r"\.\*", ".*")):
        optimizer(scalar)


@pytest.mark.parametrize("grad", [0.5, np.float32(0.5), np.array(0.5)], ids=repr)
def test_floats_as_gradients(grad):
    """They have no dimensions, like a parameter without."""
    p = np.ones((), np.float32)
    optimizer(p).step(grads=[grad])
    assert p < 1
    with pytest.raises(
        ValueError, match=r"gradient 0: expected float32 of shape \(3,\)"
    ):
        optimizer().step(grads=[grad])


@pytest.mark.parametrize("grad", [1, "0.5", True, [0.5]], ids=repr)
def test_what_is_no_gradient(grad):
    with pytest.raises(TypeError, match=r"gradient 0: expected float32 of shape \(\)"):
        optimizer(np.ones((), np.float32)).step(grads=[grad])


def test_repr():
    opt = rmsprop.RMSprop([np.ones(3)], max_grad_norm=0.5, nonfinite="skip", threads=2)
    shown = repr(opt).splitlines()
    assert {"max_grad_norm: 0.5", "nonfinite: skip", "threads: 2"} <= set(shown)
    shown = repr(TorchRMSprop([torch.ones(3)], max_grad_norm=0.5)).splitlines()
    assert shown[-2:] == ["max_grad_norm: 0.5", ")"]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    "options", [{"eps_in_sqrt": True}, {"max_grad_norm": 1.0}, {"nonfinite": "skip"}]
)
def test_what_only_torch_steps_with_options_that_it_lacks(options):
    """Refused at construction, and in a group that is added; the cause first."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex32))
    (option,) = options
    wanted = f"parameter 1: expected floats.*got complex32 on cpu.*no {option}"
    with pytest.raises(ValueError, match=wanted):
        TorchRMSprop([torch.nn.Parameter(torch.ones(2)), p], **options)
    opt = TorchRMSprop([torch.ones(2)], **options)
    with pytest.raises(ValueError, match=wanted):
        opt.add_param_group({"params": [p]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    ("params", "culprit"),
    [
        ({"dense": {"w": np.ones(3)}}, "parameter 0 ('dense')"),
        (
            [{"params": [("a", np.ones(2)), ("b", {"w": np.ones(3)})]}],
            "parameter 1 ('b')",
        ),
    ],
    ids=["mapping", "group"],
)
def test_nested_mappings(params, culprit):
    wanted = (
        f"{culprit}: expected an array, got a dict: make of a nested mapping one from"
    )
    with pytest.raises(TypeError, match=re.escape(wanted)):
        rmsprop.RMSprop(params)
