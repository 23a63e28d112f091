"""Parameter groups: options of their own, added later, changed live; and how an optimizer shows itself."""

import inspect

import numpy as np
import pytest
from oracle import Oracle
from problems import bits, gradients_for, random_arrays, random_parameters
from rmsprop import Parameter, RMSprop

DEFAULTS = {
    "lr": 1e-3,
    "alpha": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "centered": False,
    "eps_in_sqrt": True,
    "initial_square_avg": 0.0,
    "lr_in_momentum": True,
    "nesterov": False,
    "bias_correction": False,
    "decoupled_weight_decay": False,
    "cautious_weight_decay": False,
    "corrected_weight_decay": False,
    "clip_weights": None,
    "ema_decay": None,
    "maximize": False,
}
CHANGED = {
    "lr": 0.5,
    "alpha": 0.5,
    "eps": 1.0,
    "weight_decay": 0.5,
    "momentum": 0.5,
    "centered": True,
    "eps_in_sqrt": False,
    "initial_square_avg": 1.0,
    "lr_in_momentum": False,
    "nesterov": True,
    "bias_correction": True,
    "decoupled_weight_decay": True,
    "cautious_weight_decay": True,
    "corrected_weight_decay": True,
    "clip_weights": 0.5,
    "ema_decay": 0.5,
    "maximize": True,
}

# What is for decoupled decay alone.
FOR_DECOUPLED = ("cautious_weight_decay", "corrected_weight_decay")
DECOUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": True}


def test_signature_and_defaults():
    signature = inspect.signature(RMSprop)
    accepted = {name: one.default for name, one in signature.parameters.items()}
    assert list(accepted)[:8] == ["params", *list(DEFAULTS)[:6], "contiguous_params"]
    of_the_optimizer = {
        "max_grad_norm": None,
        "nonfinite": "propagate",
        "threads": None,
        "state_dtype": None,
        "rounding": "nearest",
        "master_weight_bits": None,
        "seed": 0,
    }
    assert accepted == {
        "params": inspect.Parameter.empty,
        **DEFAULTS,
        "contiguous_params": False,
        **of_the_optimizer,
    }
    keyword_only = [one.kind for one in signature.parameters.values()].count(
        inspect.Parameter.KEYWORD_ONLY
    )
    assert keyword_only == len(accepted) - 8
    opt = RMSprop(random_arrays(0))
    assert DEFAULTS.items() <= opt.defaults.items()
    assert DEFAULTS.items() <= opt.param_groups[0].items()
    assert {name: getattr(opt, name) for name in of_the_optimizer} == of_the_optimizer


def make(groups, contiguous=False, **options):
    """One parameter a group; the oracles have each group's options."""
    params = [Parameter(array) for array in random_arrays(0, [(5, 2)] * len(groups))]
    opt = RMSprop(
        [
            {"params": [param], **group}
            for param, group in zip(params, groups, strict=True)
        ],
        contiguous_params=contiguous,
        **options,
    )
    oracles = [
        Oracle([np.array(param)], **{**options, **group})
        for param, group in zip(params, groups, strict=True)
    ]
    return params, opt, oracles


def step(params, opt, oracles, seed):
    grads = gradients_for(params, seed)
    opt.step(grads=grads)
    for oracle, grad in zip(oracles, grads, strict=True):
        oracle.step([grad])


def assert_equal(params, opt, oracles):
    assert bits(params) == bits([oracle.params[0] for oracle in oracles])
    expected = dict(enumerate(oracle.state[0] for oracle in oracles))
    assert bits(opt.state_dict()["state"]) == bits(expected)


@pytest.mark.parametrize("key", CHANGED)
def test_option_of_one_group(key, contiguous):
    needed = DECOUPLED if key in FOR_DECOUPLED else {}
    made = make([{}, {key: CHANGED[key], **needed}, {}], contiguous)
    for seed in (1, 2):
        step(*made, seed)
    assert_equal(*made)


def test_options_of_the_constructor_hold_for_groups_without(contiguous):
    made = make([{}, {"lr": 0.1, "momentum": 0.0}], contiguous, lr=0.3, momentum=0.9)
    step(*made, 1)
    assert_equal(*made)


START = {"momentum": "momentum_buffer", "centered": "grad_avg"}


@pytest.mark.parametrize("key", [key for key in CHANGED if key != "initial_square_avg"])
def test_live_change_counts_from_the_next_step(key, contiguous):
    """Switched on late, momentum and centering start from zeros."""
    needed = DECOUPLED if key in FOR_DECOUPLED else {}
    params, opt, oracles = make([{}, {}], contiguous, **needed)
    step(params, opt, oracles, 1)
    opt.param_groups[1][key] = CHANGED[key]
    setattr(oracles[1].options, key, CHANGED[key])
    if key in START:
        oracles[1].state[0][START[key]] = np.zeros((5, 2), np.float32)
    for seed in (2, 3):
        step(params, opt, oracles, seed)
    assert_equal(params, opt, oracles)


def test_live_change_counts_after_a_step_that_was_refused(contiguous):
    ours, wanted = np.ones(3), np.ones(3)
    opt = RMSprop([Parameter(ours)], contiguous_params=contiguous)
    group = opt.param_groups[0]
    alpha = group["alpha"]
    group.update(lr=0.5, alpha="high")
    with pytest.raises(TypeError, match="alpha of group 0"):
        opt.step(grads=[np.ones(3)])
    group["alpha"] = alpha
    opt.step(grads=[np.ones(3)])
    RMSprop([wanted], lr=0.5).step(grads=[np.ones(3)])
    assert bits(group["params"][0].data) == bits(wanted)


@pytest.mark.parametrize("key", START)
def test_state_that_is_switched_off_is_kept(key, contiguous):
    """It stays as it is while off, and goes on from there."""
    params, opt, oracles = make([{key: CHANGED[key]}], contiguous)
    for value in (CHANGED[key], DEFAULTS[key], CHANGED[key]):
        opt.param_groups[0][key] = value
        setattr(oracles[0].options, key, value)
        step(params, opt, oracles, 1)
        assert_equal(params, opt, oracles)


@pytest.mark.parametrize("shapes", [[(0,)], [(2, 0), (3,)]], ids=str)
def test_state_of_arrays_without_elements_is_kept(shapes, contiguous):
    params = random_parameters(0, shapes)
    opt = RMSprop(params, contiguous_params=contiguous)
    keys = {"step", "square_avg"}
    assert {frozenset(entry) for entry in opt.state.values()} == {frozenset(keys)}
    for options in ({"momentum": 0.9, "centered": True}, {}, {"momentum": 0.5}):
        opt.param_groups[0].update({"momentum": 0.0, "centered": False, **options})
        opt.step()
        keys |= {START[key] for key in options}
        for param, entry in zip(params, opt.state.values(), strict=True):
            assert set(entry) == keys
            assert all(entry[key].shape == param.shape for key in keys - {"step"})


@pytest.mark.parametrize(
    "number",
    [1, np.float32(0.5), np.float64(0.5), np.int64(1)],
    ids=repr,
)
def test_options_are_any_real_number(number):
    made = make([{"lr": number, "eps": number, "weight_decay": number}])
    step(*made, 1)
    assert_equal(*made)


def test_added_group(contiguous):
    """Options that it lacks come from the constructor's; the caller's dict is left alone."""
    first, *added = random_parameters(0)
    opt = RMSprop([first], lr=0.3, momentum=0.9, contiguous_params=contiguous)
    opt.step()
    group = {"params": list(added), "momentum": 0.5, "initial_lr": 0.7}
    kept = dict(group)
    opt.add_param_group(group)
    assert group == kept
    assert group["params"] == added
    assert [(one["lr"], one["momentum"]) for one in opt.param_groups] == [
        (0.3, 0.9),
        (0.3, 0.5),
    ]
    assert opt.param_groups[1]["initial_lr"] == 0.7
    assert list(opt.state) == [0, 1, 2, 3]
    opt.step()
    assert [opt.state[index]["step"] for index in range(4)] == [2, 1, 1, 1]


def test_groups_given_are_left_alone():
    first, second = random_arrays(0, [(2,)] * 2)
    groups = [{"params": [first]}, {"params": [second], "lr": 0.5}]
    opt = RMSprop(groups)
    assert [set(group) for group in groups] == [{"params"}, {"params", "lr"}]
    opt.param_groups[1]["lr"] = 0.25
    assert groups[1]["lr"] == 0.5


def test_default_changed_live_counts_for_groups_to_come():
    first, second = random_arrays(0, [(2,)] * 2)
    opt = RMSprop([first])
    opt.defaults["lr"] = 0.5
    opt.add_param_group({"params": [second]})
    assert [group["lr"] for group in opt.param_groups] == [1e-3, 0.5]


def test_repr(contiguous):
    params = random_parameters(0)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.25}]
    shown = repr(RMSprop(groups, momentum=0.9, contiguous_params=contiguous))
    assert shown.startswith("RMSprop (\nParameter Group 0\n")
    assert shown.endswith("\n)")
    first, second = shown.split("Parameter Group 1")
    assert "    lr: 0.001\n" in first
    assert "    lr: 0.25\n" in second
    assert shown.count("    momentum: 0.9\n") == 2
    assert "params:" not in shown.replace("contiguous_params:", "")


def test_support_sparse_is_a_bool():
    assert type(RMSprop(random_arrays(0)).support_sparse) is bool
