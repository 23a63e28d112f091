"""Checkpoints: torch's shape and keys, copies both ways, the same bits after a reload; a refused one changes nothing."""

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from problems import NAMES, bits, random_arrays, random_parameters, snapshot, train
from rmsprop import Parameter, RMSprop, dialect

OPTIONS = {"momentum": 0.9, "centered": True, "weight_decay": 0.01}
KEYS = ("step", "square_avg", "grad_avg", "momentum_buffer")


def build(contiguous, seed=0, **options):
    """Two groups of two parameters."""
    params = random_parameters(seed)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}]
    return params, RMSprop(
        groups, **{**OPTIONS, **options}, contiguous_params=contiguous
    )


def copied(params):
    return [Parameter(np.array(param), param.name) for param in params]


# --- shape ------------------------------------------------------------------------------------


def test_shape_and_keys(contiguous):
    params, opt = build(contiguous)
    train(opt, params, range(2))
    loaded = opt.state_dict()
    assert set(loaded) == {"state", "param_groups"}
    assert [group["params"] for group in loaded["param_groups"]] == [[0, 1], [2, 3]]
    assert [group["lr"] for group in loaded["param_groups"]] == [1e-3, 0.01]
    assert list(loaded["state"]) == [0, 1, 2, 3]
    for param, state in zip(params, loaded["state"].values(), strict=True):
        assert type(state) is dict
        assert set(state) == set(KEYS)
        assert (type(state["step"]), state["step"]) == (int, 2)
        for key in KEYS[1:]:
            assert (type(state[key]), state[key].dtype) == (np.ndarray, param.dtype)
            assert state[key].shape == param.shape


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, {"step", "square_avg"}),
        ({"centered": True}, {"step", "square_avg", "grad_avg"}),
        ({"momentum": 0.5}, {"step", "square_avg", "momentum_buffer"}),
    ],
)
def test_only_the_state_in_use(options, keys):
    opt = RMSprop(random_arrays(0), **options)
    assert all(set(state) == keys for state in opt.state_dict()["state"].values())


def test_state_starts_at_its_start_value():
    """From the constructor on, before any step."""
    params = random_arrays(0)
    opt = RMSprop(params, initial_square_avg=1.0, **OPTIONS)
    assert list(opt.state) == [0, 1, 2, 3]
    for index, param in enumerate(params):
        expected = {key: np.zeros_like(param) for key in KEYS[1:]}
        expected |= {"step": 0, "square_avg": np.ones_like(param)}
        assert bits(opt.state[index]) == bits(expected)


# --- copies both ways -------------------------------------------------------------------------


def test_saved_is_a_copy(contiguous):
    params, opt = build(contiguous)
    train(opt, params, range(2))
    saved = opt.state_dict()
    before = bits(saved)
    train(opt, params, [5])
    assert bits(saved) == before
    now = snapshot(opt)
    for state in saved["state"].values():
        for key in KEYS[1:]:
            state[key][...] = 99
    saved["param_groups"][0]["lr"] = 99
    assert snapshot(opt) == now


def test_loaded_is_a_copy_and_stays_whole(contiguous):
    """The same dict loads twice, into two optimizers that share nothing."""
    params, opt = build(contiguous)
    train(opt, params, range(2))
    saved = opt.state_dict()
    before = bits(saved)
    first_params, first = build(contiguous, seed=7)
    second_params, second = build(contiguous, seed=7)
    first.load_state_dict(saved)
    train(first, first_params, [3, 4])
    second.load_state_dict(saved)
    assert bits(saved) == before
    assert bits(second.state_dict()) == before
    train(second, second_params, [3, 4])
    assert snapshot(first) == snapshot(second)


# --- continuation -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("loaded_contiguous", [False, True])
def test_continues_bit_for_bit(contiguous, loaded_contiguous, bias_correction):
    """Also from `contiguous_params=False` to True and back."""
    params, opt = build(contiguous, bias_correction=bias_correction)
    train(opt, params, range(3))
    other_params = copied(params)
    other = RMSprop(
        [{"params": other_params[:2]}, {"params": other_params[2:]}],
        lr=5.0,
        contiguous_params=loaded_contiguous,
    )
    other.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    for one, its_params in ((opt, params), (other, other_params)):
        train(one, its_params, range(3, 6))
    assert bits(other_params) == bits(params)
    assert bits(other.state_dict()["state"]) == bits(opt.state_dict()["state"])
    assert other.param_groups[1]["lr"] == 0.01


DUPLICATES = {
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_duplicate_with_its_parameters(contiguous, duplicate):
    """The copy trains the copied parameters and leaves the original alone."""
    params, opt = build(contiguous, max_grad_norm=1.0, nonfinite="skip", threads=2)
    train(opt, params, range(3))
    before = snapshot(opt)
    other_params, other = duplicate((params, opt))
    kept = [param for group in other.param_groups for param in group["params"]]
    assert all(one is two for one, two in zip(kept, other_params, strict=True))
    assert (other.max_grad_norm, other.nonfinite, other.threads) == (1.0, "skip", 2)
    assert snapshot(other) == before
    train(other, other_params, range(3, 6))
    assert snapshot(opt) == before
    train(opt, params, range(3, 6))
    assert snapshot(other) == snapshot(opt)


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_duplicate_of_an_optimizer_of_plain_arrays(duplicate):
    params = dict(zip(NAMES, random_arrays(0), strict=True))
    opt = RMSprop(params, **OPTIONS)
    opt.step(grads=random_arrays(1))
    before = snapshot(opt)
    other = duplicate(opt)
    assert snapshot(other) == before
    other.step(grads=random_arrays(2))
    assert snapshot(opt) == before
    opt.step(grads=random_arrays(2))
    assert snapshot(other) == snapshot(opt)


# --- torch ------------------------------------------------------------------------------------

TORCH_OPTIONS = [
    {},
    {"momentum": 0.9},
    {"centered": True, "weight_decay": 0.01},
    {"momentum": 0.9, "centered": True, "maximize": True},
]


def torch_pair(options):
    params = [torch.tensor(array, requires_grad=True) for array in random_arrays(0)]
    return params, torch.optim.RMSprop(params, lr=0.01, **options)


def array_pair(options):
    params = random_arrays(0)
    return params, RMSprop(params, lr=0.01, **dialect("torch", **options))


def train_both(pair, torch_side, seeds):
    (_, opt), (tensors, torch_opt) = pair, torch_side
    for seed in seeds:
        grads = random_arrays((3, seed))
        opt.step(grads=grads)
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = torch.from_numpy(grad)
        torch_opt.step()


def assert_close(params, tensors):
    for param, tensor in zip(params, tensors, strict=True):
        np.testing.assert_allclose(param, tensor.detach().numpy(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("options", TORCH_OPTIONS)
def test_torch_checkpoint_loads(options):
    theirs, ours = torch_pair(options), array_pair(options)
    train_both(ours, theirs, range(3))
    saved = theirs[1].state_dict()
    params, opt = array_pair({})
    for param, tensor in zip(params, theirs[0], strict=True):
        param[...] = tensor.detach().numpy()
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["foreach"] is None  # torch's own keys are kept
    assert opt.state[0]["step"] == 3
    for index, state in saved["state"].items():
        for key in set(state) - {"step"}:
            assert bits(opt.state[index][key]) == bits(state[key])
    train_both((params, opt), theirs, range(3, 6))
    assert_close(params, theirs[0])


@pytest.mark.parametrize("options", TORCH_OPTIONS)
def test_checkpoint_loads_in_torch(options):
    theirs, ours = torch_pair(options), array_pair(options)
    train_both(ours, theirs, range(3))
    saved = ours[1].state_dict()
    saved["state"] = {
        index: {key: torch.tensor(value) for key, value in state.items()}
        for index, state in saved["state"].items()
    }
    tensors, torch_opt = torch_pair({})
    torch_opt.load_state_dict(saved)
    with torch.no_grad():
        for tensor, param in zip(tensors, ours[0], strict=True):
            tensor.copy_(torch.from_numpy(param))
    train_both(ours, (tensors, torch_opt), range(3, 6))
    assert_close(ours[0], tensors)


# --- older and foreign checkpoints ------------------------------------------------------------


def test_missing_options_take_the_defaults(contiguous):
    params, opt = build(contiguous, eps_in_sqrt=False, nesterov=True)
    train(opt, params, range(2))
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        del group["nesterov"], group["eps_in_sqrt"]
    _, other = build(contiguous, nesterov=True)
    other.load_state_dict(saved)
    assert all(
        (group["nesterov"], group["eps_in_sqrt"]) == (True, True)
        for group in other.param_groups
    )


def test_missing_state_takes_its_start_value():
    params, opt = build(contiguous=False, initial_square_avg=1.0)
    train(opt, params, range(2))
    saved = opt.state_dict()
    del saved["state"][0]
    del saved["state"][1]["grad_avg"], saved["state"][1]["momentum_buffer"]
    del saved["state"][2]["square_avg"]
    opt.load_state_dict(saved)
    assert [opt.state[index]["step"] for index in range(4)] == [0, 2, 2, 2]
    for index, key, start in [
        (0, "square_avg", 1),
        (0, "grad_avg", 0),
        (1, "grad_avg", 0),
        (1, "momentum_buffer", 0),
        (2, "square_avg", 1),
    ]:
        assert (opt.state[index][key] == start).all()


def test_unknown_group_keys_are_kept(contiguous):
    _, opt = build(contiguous)
    saved = opt.state_dict()
    saved["param_groups"][0]["initial_lr"] = 0.5
    opt.load_state_dict(saved)
    assert opt.state_dict()["param_groups"][0]["initial_lr"] == 0.5


def test_a_checkpoint_without_clipping_does_not_switch_it_off():
    saved = RMSprop(random_parameters(0), lr=0.5).state_dict()
    group = {"params": random_parameters(0), "clip_grad_max_norm": 0.5}
    opt = RMSprop([{**group, "clip_grad_norm_type": 2.0}])
    opt.load_state_dict(saved)
    loaded = opt.param_groups[0]
    assert (loaded["lr"], loaded["clip_grad_max_norm"]) == (0.5, 0.5)


# --- refused ----------------------------------------------------------------------------------


def put(path, value):
    """Puts a value, or what a function makes of the old one, at a path of keys."""

    def break_it(saved):
        *parents, last = path
        for key in parents:
            saved = saved[key]
        saved[last] = value(saved[last]) if callable(value) else value

    return break_it


REFUSED = {
    "shape": (
        ValueError,
        "square_avg",
        put(["state", 3, "square_avg"], lambda v: v[:1]),
    ),
    "shape of the same size": (
        ValueError,
        "grad_avg",
        put(["state", 0, "grad_avg"], np.transpose),
    ),
    "dtype": (
        ValueError,
        "momentum_buffer.*float32.*float64",
        put(["state", 2, "momentum_buffer"], np.float64),
    ),
    "not an array": (
        (TypeError, ValueError),
        "square_avg.*str",
        put(["state", 2, "square_avg"], "zeros"),
    ),
    "negative step": (ValueError, "step.*-1", put(["state", 1, "step"], -1)),
    "step that is no number": (
        (TypeError, ValueError),
        "step",
        put(["state", 1, "step"], "two"),
    ),
    "unknown parameter": (ValueError, "4", put(["state", 4], {"step": 1})),
    "unknown state": (ValueError, "exp_avg", put(["state", 1, "exp_avg"], 0)),
    "number of groups": (ValueError, "group", put(["param_groups"], lambda v: v[:1])),
    "number of parameters": (
        ValueError,
        "group",
        put(["param_groups", 1, "params"], [2]),
    ),
    "option out of range": (
        ValueError,
        "lr of group 1.*-1",
        put(["param_groups", 1, "lr"], -1.0),
    ),
    "option that is no number": (
        (TypeError, ValueError),
        "alpha of group 1",
        put(["param_groups", 1, "alpha"], "x"),
    ),
}


@pytest.mark.parametrize(
    ("exception", "message", "break_it"), REFUSED.values(), ids=REFUSED
)
def test_refused_checkpoint_changes_nothing(exception, message, break_it, contiguous):
    params, opt = build(contiguous)
    train(opt, params, range(2))
    other_params, other = build(contiguous, seed=4)
    train(other, other_params, range(3))
    saved = other.state_dict()
    break_it(saved)
    before = snapshot(opt)
    with pytest.raises(exception, match=message):
        opt.load_state_dict(saved)
    assert snapshot(opt) == before


# --- live state -------------------------------------------------------------------------------


def test_state_is_the_memory_in_use(contiguous):
    """Writing into an array of `state`, or assigning one, counts at the next step."""
    written, assigned = build(contiguous), build(contiguous)
    for params, opt in (written, assigned):
        train(opt, params, range(2))
    value = random_arrays(8)[3] ** 2
    written[1].state[3]["square_avg"][...] = value
    assigned[1].state[3]["square_avg"] = value
    value[...] = -1  # assigning has copied
    for params, opt in (written, assigned):
        train(opt, params, [5])
    assert snapshot(written[1]) == snapshot(assigned[1])
    assert (written[1].state[3]["square_avg"] >= 0).all()


def test_arrays_of_state_outlive_the_optimizer():
    params, opt = build(contiguous=False)
    train(opt, params, range(2))
    before = bits(opt.state_dict()["state"][3])
    held = dict(opt.state[3])
    del opt, params
    gc.collect()
    assert bits(held) == before


def test_assigned_step_counts():
    params, opt = build(contiguous=False, bias_correction=True)
    other_params, other = build(contiguous=False, bias_correction=True)
    opt.state[0]["step"] = 5
    saved = other.state_dict()
    saved["state"][0]["step"] = 5
    other.load_state_dict(saved)
    for one, its_params in ((opt, params), (other, other_params)):
        train(one, its_params, [1])
    assert opt.state[0]["step"] == 6
    assert snapshot(opt) == snapshot(other)


def test_assigned_entry():
    params, opt = build(contiguous=False)
    train(opt, params, range(2))
    entry = copy.deepcopy(opt.state_dict()["state"][1])
    train(opt, params, [2])
    opt.state[1] = entry
    assert bits(opt.state_dict()["state"][1]) == bits(entry)
    assert [opt.state[index]["step"] for index in range(4)] == [3, 2, 3, 3]


@pytest.mark.parametrize(
    "assign",
    [
        lambda state: state[0].__setitem__("square_avg", np.zeros(3, "float32")),
        lambda state: state[0].__setitem__("square_avg", np.zeros((7, 5))),
        lambda state: state[0].__setitem__("step", -1),
        lambda state: state[0].__setitem__("exp_avg", 0),
        lambda state: state.__setitem__(
            0, {"step": 1, "square_avg": np.zeros(3, "float32")}
        ),
        lambda state: state.__setitem__(4, {"step": 1}),
    ],
    ids=["shape", "dtype", "step", "key", "entry", "parameter"],
)
def test_bad_assignment_changes_nothing(assign, contiguous):
    params, opt = build(contiguous)
    train(opt, params, range(2))
    before = snapshot(opt)
    with pytest.raises(ValueError):
        assign(opt.state)
    assert snapshot(opt) == before


@pytest.mark.parametrize("deleted", [[2], [0, 1, 2, 3]])
def test_deleted_state_starts_again(deleted, contiguous):
    params, opt = build(contiguous, initial_square_avg=1.0)
    fresh = bits(opt.state_dict()["state"])
    train(opt, params, range(2))
    trained = bits(opt.state_dict()["state"])
    if len(deleted) == 1:
        del opt.state[2]
    else:
        opt.state.clear()
    expected = {
        index: (fresh if index in deleted else trained)[index] for index in range(4)
    }
    assert bits(opt.state_dict()["state"]) == expected


# --- by name ----------------------------------------------------------------------------------


def named(order, seed=0):
    """Parameters of one shape that are known by their names, in this order."""
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=4) for name in sorted(order)}
    params = {name: values[name] for name in order}
    return params, RMSprop(params, **OPTIONS)


def test_another_order():
    """Each gets the state of its own name, and goes on as in the order that was saved."""
    (saved, opt), (other, loaded) = named("abc"), named("cab")
    grads = {name: np.full(4, k - 0.5) for k, name in enumerate("abc")}
    opt.step(grads=grads)
    loaded.load_state_dict(opt.state_dict())
    for name, param in saved.items():
        other[name][...] = param
    for index, name in enumerate("cab"):
        assert bits(loaded.state[index]) == bits(opt.state["abc".index(name)])
    for each in (opt, loaded):
        each.step(grads=grads)
    assert all((other[name] == saved[name]).all() for name in "abc")


def test_other_names():
    (_, opt), (params, other) = named("abc"), named("abd")
    other.step(grads={name: np.ones(4) for name in params})
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"same names, got \['c'\] for \['d'\]"):
        other.load_state_dict(opt.state_dict())
    assert snapshot(other) == before


def test_names_on_one_side():
    """Then by position."""
    (params, opt), (other, _) = named("abc"), named("abc")
    opt.step(grads={name: np.ones(4) for name in params})
    unnamed = RMSprop(list(other.values()), **OPTIONS)
    unnamed.load_state_dict(opt.state_dict())
    assert bits(unnamed.state[1]) == bits(opt.state[1])
    opt.load_state_dict(unnamed.state_dict())
