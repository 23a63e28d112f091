"""`opt.lr` and the like are those of all groups; a key of a group that is a wrong name of an option is refused with the right one."""

import numpy as np
import pytest
from rmsprop import RMSprop, dialect

VALUES = {
    "lr": 0.5,
    "alpha": 0.5,
    "eps": 0.5,
    "weight_decay": 0.5,
    "momentum": 0.5,
    "centered": True,
    "eps_in_sqrt": False,
    "initial_square_avg": 0.5,
    "lr_in_momentum": False,
    "nesterov": True,
    "bias_correction": True,
    "decoupled_weight_decay": True,
    "clip_weights": 0.5,
    "ema_decay": 0.5,
    "maximize": True,
}
EACH = pytest.mark.parametrize("name, value", VALUES.items(), ids=VALUES)

WRONG = {
    "learning_rate": "lr",
    "rho": "alpha",
    "decay": "alpha",
    "epsilon": "eps",
    "Lr": "lr",
    "alhpa": "alpha",
    "momentumm": "momentum",
    "weight_deca": "weight_decay",
    "max_grad_nor": "max_grad_norm",
}
EACH_WRONG = pytest.mark.parametrize("wrong, right", WRONG.items(), ids=WRONG)


def two_groups(**options):
    groups = [{"params": [np.ones(3)], **options}, {"params": [np.ones(2)]}]
    return RMSprop(groups)


@EACH
def test_set(name, value):
    """In every group, and the next step computes with it."""
    opt, wanted = two_groups(), two_groups()
    assert getattr(opt, name) == opt.defaults[name] != value
    setattr(opt, name, value)
    assert getattr(opt, name) == value
    for group in wanted.param_groups:
        assert group[name] != value
        group[name] = value
    for each in (opt, wanted):
        for seed in range(3):
            each.step(grads=[np.full(3, seed - 1.5), np.full(2, seed + 0.5)])
    for mine, its in zip(opt.param_groups, wanted.param_groups, strict=True):
        assert mine[name] == value
        assert mine["params"][0].tolist() == its["params"][0].tolist()


@EACH
def test_groups_that_differ(name, value):
    opt = two_groups(**{name: value})
    with pytest.raises(ValueError, match=f"{name}: expected one value.*param_groups"):
        getattr(opt, name)
    setattr(opt, name, value)
    assert getattr(opt, name) == value


@pytest.mark.parametrize("value", [-1.0, float("nan"), "much", None])
def test_a_bad_value(value):
    opt = two_groups()
    with pytest.raises((TypeError, ValueError), match="lr of group 0: expected"):
        opt.lr = value
    assert opt.lr == opt.defaults["lr"]


@EACH_WRONG
def test_wrong_names(wrong, right):
    """At construction, in a group that is added, and in one that is live."""
    group = {"params": [np.ones(3)], wrong: 0.5}
    with pytest.raises(
        ValueError, match=f"{wrong} of group 0: expected the key {right}"
    ):
        RMSprop([group])
    opt = RMSprop([np.ones(2)])
    with pytest.raises(
        ValueError, match=f"{wrong} of group 1: expected the key {right}"
    ):
        opt.add_param_group(group)
    opt.param_groups[0][wrong] = 0.5
    before = opt.param_groups[0]["params"][0].copy()
    with pytest.raises(
        ValueError, match=f"{wrong} of group 0: expected the key {right}"
    ):
        opt.step(grads=[np.ones(2)])
    assert (opt.param_groups[0]["params"][0] == before).all()
    del opt.param_groups[0][wrong]
    opt.step(grads=[np.ones(2)])


@EACH_WRONG
def test_wrong_names_of_a_dialect(wrong, right):
    with pytest.raises(TypeError, match=rf"'{wrong}' \(did you mean {right}\?\)"):
        dialect("keras", **{wrong: 0.5})


def test_keys_of_the_user():
    keys = ["initial_lr", "name", "clip_grad_max_norm", "foreach", "note", "swa_lr"]
    opt = RMSprop([{"params": [np.ones(3)], **dict.fromkeys(keys, 1.0)}])
    opt.step(grads=[np.ones(3)])
    assert opt.param_groups[0]["note"] == 1.0
