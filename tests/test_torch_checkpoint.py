"""Promise: checkpoints are torch's own, go both ways between `rmsprop.torch`, torch and the array class, and training goes on as if nothing had happened."""

import copy
import io
import pickle

import numpy as np
import pytest
import rmsprop
import torch
from rmsprop.torch import RMSprop
from torch_pairs import (
    CLASSES,
    FORMS,
    OWN,
    Side,
    Stock,
    assert_close,
    assert_same,
    bits,
    both,
    build,
    normal,
    parameters,
    snapshot,
    train_both,
)

form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
crossing = pytest.mark.parametrize(
    ("source", "target"),
    [(Stock, RMSprop), (RMSprop, Stock), (RMSprop, RMSprop)],
    ids=["from torch", "to torch", "ours"],
)


def through_a_file(saved, **options):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, **options)


def resume(cls, side, saved, **options):
    """A new optimizer of other options, with copies of the parameters and checkpoint."""
    params = [p.detach().clone().requires_grad_() for p in side.params]
    resumed = Side(params, cls(params, lr=7.0, **options))
    resumed.opt.load_state_dict(copy.deepcopy(saved))
    return resumed


# --- what is in it ----------------------------------------------------------------------------


@form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_tree_as_torchs(form, dtype):
    """Keys in the same order, types, dtypes, shapes, strides; groups equal."""
    sides = both(dtype=dtype, **form)
    train_both(sides, range(3))
    its, ours = (side.opt.state_dict() for side in sides)
    assert list(ours) == list(its)
    assert ours["param_groups"] == its["param_groups"]
    assert [list(g) for g in ours["param_groups"]] == [
        list(g) for g in its["param_groups"]
    ]
    assert list(ours["state"]) == list(its["state"])
    for index, state in its["state"].items():
        mine = ours["state"][index]
        assert list(mine) == list(state)
        assert_close(list(mine.values()), list(state.values()))
        assert mine["step"].dtype == state["step"].dtype


def test_only_what_has_been_stepped():
    """Empty before the first step, and without what never had a gradient."""
    side = build(RMSprop)
    assert side.opt.state_dict()["state"] == {}
    side.set_gradients(0)
    side.params[1].grad = None
    side.opt.step()
    assert list(side.opt.state_dict()["state"]) == [0, 2, 3]


def test_indices_over_groups_and_names():
    named = [(f"p{i}", p) for i, p in enumerate(parameters(0))]
    stock, ours = (
        cls([{"params": named[:1]}, {"params": named[1:]}]).state_dict()
        for cls in CLASSES
    )
    assert ours == stock
    assert ours["param_groups"][1]["params"] == [1, 2, 3]
    assert ours["param_groups"][1]["param_names"] == ["p1", "p2", "p3"]


# --- there and back ---------------------------------------------------------------------------


@form
@crossing
@pytest.mark.parametrize("weights_only", [True, False])
def test_training_goes_on(form, source, target, weights_only):
    """Through a file, in the middle of training, in every direction."""
    side = build(source, **form)
    side.train(range(3))
    saved = through_a_file(side.opt.state_dict(), weights_only=weights_only)
    resumed = resume(target, side, saved)
    assert resumed.opt.param_groups[0]["lr"] == 0.01
    train_both((side, resumed), range(3, 6))
    if source is target:
        assert snapshot(side) == snapshot(resumed)
    assert_same(side, resumed)


@form
def test_a_round_trip_through_torch_changes_no_bit(form):
    side = build(RMSprop, **form)
    side.train(range(3))
    by_torch = resume(Stock, side, side.opt.state_dict())
    back = resume(RMSprop, side, by_torch.opt.state_dict())
    train_both((side, back), range(3, 6))
    assert snapshot(side) == snapshot(back)


def test_our_own_options_survive_a_file():
    options = {"momentum": 0.9, "weight_decay": 0.1, **OWN}
    side = build(RMSprop, **options)
    side.train(range(3))
    saved = through_a_file(side.opt.state_dict(), weights_only=True)
    resumed = resume(RMSprop, side, saved)
    train_both((side, resumed), range(3, 6))
    assert snapshot(side) == snapshot(resumed)


def test_a_checkpoint_of_torch_leaves_our_own_options_alone():
    """In every group, and what belongs to the optimizer."""
    side = build(Stock, momentum=0.9, weight_decay=0.1)
    side.train(range(3))
    saved = side.opt.state_dict()
    limits = {"max_grad_norm": 0.5, "nonfinite": "skip", "threads": 2}
    resumed = resume(RMSprop, side, saved, **OWN, **limits)
    assert {k: getattr(resumed.opt, k) for k in limits} == limits
    alike = resume(RMSprop, side, saved, max_grad_norm=0.5)
    alike.opt.param_groups[0].update(OWN)
    train_both((resumed, alike), range(3, 6))
    assert snapshot(resumed) == snapshot(alike)

    group = resumed.opt.param_groups[0]
    assert {key: group[key] for key in OWN} == OWN
    plain = resume(RMSprop, side, saved, max_grad_norm=0.5)
    plain.train(range(3, 6))
    assert snapshot(plain) != snapshot(resumed)


def test_contiguous_params_is_not_in_the_numbers():
    """Saved with it, resumed without, and the other way round."""
    sides = [build(RMSprop, contiguous_params=c, momentum=0.9) for c in (False, True)]
    train_both(sides, range(3))
    assert snapshot(sides[0]) == snapshot(sides[1])
    for c, side in zip((True, False), sides, strict=True):
        saved = side.opt.state_dict()
        resumed = resume(RMSprop, side, saved, contiguous_params=c)
        train_both((side, resumed), range(3, 6))
        assert snapshot(side) == snapshot(resumed)


# --- the array class --------------------------------------------------------------------------

ARRAY_OPTIONS = {
    "torch": rmsprop.dialect("torch"),
    "torch, all": rmsprop.dialect("torch", **FORMS["all"]),
    "tf1": rmsprop.dialect("tf1", momentum=0.9, weight_decay=0.1),
    "keras": rmsprop.dialect("keras", weight_decay=0.1),
    "own": rmsprop.dialect("torch", momentum=0.9, weight_decay=0.1) | OWN,
}
array_options = pytest.mark.parametrize(
    "options", ARRAY_OPTIONS.values(), ids=ARRAY_OPTIONS
)


def array_grads(side, seed):
    side.set_gradients(seed)
    return [param.grad.numpy() for param in side.params]


@array_options
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_checkpoint_of_arrays_loads(options, dtype):
    """With its options; the next steps are the same to the bit."""
    side = build(RMSprop, dtype=dtype)
    arrays = [p.detach().numpy().copy() for p in side.params]
    opt = rmsprop.RMSprop(arrays, lr=0.01, **options)
    for seed in range(3):
        opt.step(grads=array_grads(side, seed))
    saved = opt.state_dict()
    with torch.no_grad():
        for param, array in zip(side.params, arrays, strict=True):
            param.copy_(torch.from_numpy(array))
    side.opt.load_state_dict(saved)
    for state in side.state():
        assert {type(value) for value in state.values()} == {torch.Tensor}
    before = copy.deepcopy(saved)
    for seed in range(3, 6):
        grads = array_grads(side, seed)
        side.opt.step()
        opt.step(grads=grads)
    for param, array in zip(side.params, arrays, strict=True):
        assert param.detach().numpy().tobytes() == array.tobytes()
    assert_equal_trees(saved, before)


@array_options
def test_a_checkpoint_of_ours_loads_in_the_array_class(options):
    side = build(RMSprop, **options)
    side.train(range(3))
    arrays = [p.detach().numpy().copy() for p in side.params]
    opt = rmsprop.RMSprop(arrays, lr=7.0, **options)
    opt.load_state_dict(side.opt.state_dict())
    assert opt.param_groups[0]["lr"] == 0.01
    for seed in range(3, 6):
        grads = array_grads(side, seed)
        side.opt.step()
        opt.step(grads=grads)
    for param, array in zip(side.params, arrays, strict=True):
        assert param.detach().numpy().tobytes() == array.tobytes()


def assert_equal_trees(one, two):
    """Also of NumPy arrays."""
    if isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_equal_trees(one[key], two[key])
    elif isinstance(one, list):
        for left, right in zip(one, two, strict=True):
            assert_equal_trees(left, right)
    else:
        np.testing.assert_array_equal(one, two)


# --- older and other checkpoints --------------------------------------------------------------

LATE_KEYS = ("momentum", "centered", "foreach", "maximize", "differentiable")
LATE_KEYS += ("capturable",)


@form
def test_checkpoints_of_older_versions(form):
    """Without the keys that came later, and with steps that are plain numbers."""
    maker = build(Stock, **form)
    maker.train(range(3))
    saved = maker.opt.state_dict()
    for key in LATE_KEYS:
        if not form.get(key):
            del saved["param_groups"][0][key]
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    sides = [resume(cls, maker, saved) for cls in CLASSES]
    groups = [dict(side.opt.param_groups[0], params=None) for side in sides]
    assert groups[0] == groups[1]
    for mine, its in zip(sides[1].state(), sides[0].state(), strict=True):
        assert mine["step"].dtype == its["step"].dtype == torch.float32
        assert mine["step"] == its["step"] == 3
    train_both(sides, range(3, 5))
    assert_same(*sides)


@pytest.mark.parametrize(
    "kind",
    [float, int, bool, np.float32, np.int64]
    + [torch.float64, torch.float32, torch.int64],
    ids=str,
)
def test_steps_of_other_types_count_on(kind):
    side = build(Stock)
    side.train([0])
    sides = []
    for cls in CLASSES:
        saved = copy.deepcopy(side.opt.state_dict())
        for state in saved["state"].values():
            state["step"] = (
                state["step"].to(kind)
                if isinstance(kind, torch.dtype)
                else kind(state["step"])
            )
        resumed = resume(cls, side, saved)
        resumed.train(range(1, 3))
        assert [float(state["step"]) for state in resumed.state()] == [3.0] * 4
        sides.append(resumed)
    assert_same(*sides)


def test_state_of_another_type_is_converted():
    """As torch does: to the type of the parameter, but the step."""
    saved = build(Stock, momentum=0.9)
    saved.train(range(2))
    sides = []
    for cls in CLASSES:
        side = build(cls, dtype=torch.float64, momentum=0.9)
        side.opt.load_state_dict(copy.deepcopy(saved.opt.state_dict()))
        side.train(range(2, 4))
        sides.append(side)
    assert_same(*sides)
    assert sides[1].state()[0]["step"].dtype == torch.float32


def test_foreign_keys_are_kept():
    """In groups, in the state of a parameter, and beside the parameters."""
    for cls in CLASSES:
        side = build(cls)
        side.train([0])
        saved = side.opt.state_dict()
        saved["param_groups"][0]["initial_lr"] = 0.5
        saved["state"][0]["note"] = 7
        saved["state"]["extra"] = 3
        side.opt.load_state_dict(saved)
        side.train([1])
        again = side.opt.state_dict()
        assert again["param_groups"][0]["initial_lr"] == 0.5
        assert again["state"][0]["note"] == 7
        assert again["state"]["extra"] == 3


@pytest.mark.parametrize("key", ["momentum_buffer", "grad_avg"])
def test_missing_state_starts_anew(key):
    """torch stops with a KeyError; the averages that are there are used."""
    sides = both(momentum=0.9, centered=True)
    train_both(sides, range(2))
    for side in sides:
        saved = side.opt.state_dict()
        for index, state in saved["state"].items():
            del state[key]
            if side is sides[0]:
                state[key] = torch.zeros_like(side.params[index])
        side.opt.load_state_dict(saved)
    train_both(sides, range(2, 4))
    assert_close(sides[1].params, sides[0].params)


REFUSED = {
    "number of groups": lambda saved: saved["param_groups"].append(
        saved["param_groups"][0]
    ),
    "number of parameters": lambda saved: saved["param_groups"][0]["params"].pop(),
    "no groups": lambda saved: saved.pop("param_groups"),
    "no state": lambda saved: saved.pop("state"),
}


@pytest.mark.parametrize("break_it", REFUSED.values(), ids=REFUSED)
def test_refused_as_torch_does(break_it):
    said = []
    for cls in CLASSES:
        side = build(cls)
        side.train([0])
        before = snapshot(side)
        saved = copy.deepcopy(side.opt.state_dict())
        break_it(saved)
        with pytest.raises((ValueError, KeyError)) as caught:
            side.opt.load_state_dict(saved)
        said.append((caught.type, str(caught.value)))
        assert snapshot(side) == before
    assert said[0] == said[1]


# --- copies and aliases -----------------------------------------------------------------------


def test_a_dict_aliases_what_torchs_does():
    """`state_dict` hands out the state itself; loading keeps tensors that fit."""
    for cls in CLASSES:
        side = build(cls)
        side.train([0])
        saved = side.opt.state_dict()
        state = side.state()[0]
        assert saved["state"][0]["square_avg"] is state["square_avg"]
        other = build(cls)
        other.opt.load_state_dict(saved)
        loaded = other.state()[0]
        assert loaded["square_avg"] is state["square_avg"]
        assert loaded["step"] is state["step"]


def test_loading_changes_nothing_in_the_dict():
    for cls in CLASSES:
        side = build(cls, momentum=0.9)
        side.train(range(2))
        saved = copy.deepcopy(side.opt.state_dict())
        before = copy.deepcopy(saved)
        side.opt.load_state_dict(saved)
        assert bits(saved["state"]) == bits(before["state"])
        assert saved["param_groups"] == before["param_groups"]


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
    "file": lambda it: through_a_file(it, weights_only=False),
}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
@pytest.mark.parametrize("own", [{}, OWN], ids=["plain", "own"])
def test_duplicates_go_on_alone(duplicate, own):
    """Together with their parameters; what they do does not reach the original."""
    options = {"momentum": 0.9, "weight_decay": 0.1, **own}
    limits = {"max_grad_norm": 0.5, "nonfinite": "skip", "threads": 2}
    side = build(RMSprop, **options, **limits)
    side.train(range(2))
    before = snapshot(side)
    params, opt = duplicate((side.params, side.opt))
    other = Side(params, opt)
    assert snapshot(other) == before
    assert {k: getattr(opt, k) for k in limits} == limits
    other.train(range(2, 4))
    assert snapshot(side) == before
    side.train(range(2, 4))
    assert snapshot(side) == snapshot(other)


def test_a_duplicate_has_the_same_public_attributes():
    opt = build(RMSprop, **OWN).opt
    attributes = [
        {name for name in vars(o) if not name.startswith("_")}
        for o in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)))
    ]
    assert attributes[0] == attributes[1] == attributes[2]


def test_a_duplicate_has_no_hooks():
    """They are left behind by torch's optimizers, which lets them be pickled."""
    for cls in CLASSES:
        opt = build(cls).opt
        opt.register_step_pre_hook(lambda *_: pytest.fail("called"))
        copy.deepcopy(opt).step()
        pickle.loads(pickle.dumps(opt)).step()


# --- hooks ------------------------------------------------------------------------------------


def test_hooks_of_saving_and_loading():
    """Called in torch's order with what torch hands them; what they return counts."""
    logs = []
    for cls in CLASSES:
        side = build(cls)
        side.train([0])
        opt, log = side.opt, []

        def before_saving(o, log=log):
            log.append(("before saving", type(o).__name__))

        def after_saving(o, saved, log=log):
            log.append(("after saving", sorted(saved)))
            return {**saved, "note": 1}

        def before_loading(o, saved, log=log):
            log.append(("before loading", sorted(saved)))
            changed = copy.deepcopy(saved)
            changed["param_groups"][0]["lr"] = 0.5
            return changed

        def first(o, saved, log=log):
            log.append("first")
            saved["param_groups"][0]["alpha"] = 0.25  # in place, and nothing returned

        def after_loading(o, log=log):
            log.append(("after loading", o.param_groups[0]["lr"]))

        opt.register_state_dict_pre_hook(before_saving)
        opt.register_state_dict_post_hook(after_saving)
        opt.register_load_state_dict_pre_hook(before_loading)
        opt.register_load_state_dict_pre_hook(first, prepend=True)
        handle = opt.register_load_state_dict_post_hook(after_loading)
        saved = opt.state_dict()
        assert saved["note"] == 1
        opt.load_state_dict(saved)
        assert (opt.param_groups[0]["lr"], opt.param_groups[0]["alpha"]) == (0.5, 0.25)
        handle.remove()
        opt.load_state_dict(saved)
        side.train([1])
        logs.append(log)
    assert logs[0] == logs[1]
    assert len(logs[0]) == 7


def test_a_hook_may_put_its_own_state_in():
    for cls in CLASSES:
        side = build(cls)
        side.train([0])

        def rename(o, saved):
            saved["state"] = {int(k): v for k, v in saved["state"].items()}

        side.opt.register_load_state_dict_pre_hook(rename)
        saved = side.opt.state_dict()
        saved["state"] = {str(k): v for k, v in saved["state"].items()}
        side.opt.load_state_dict(saved)
        assert side.state()[0]["step"] == 1


def test_parameters_may_have_moved_to_another_group_by_name():
    """A model's parameters in another order: what the hook of the torch docs does."""
    side = build(RMSprop)
    names = [f"p{i}" for i in range(4)]
    opt = RMSprop(list(zip(names, side.params, strict=True)))
    side.opt = opt
    side.train([0])
    saved = opt.state_dict()
    other = RMSprop(list(zip(names, side.params, strict=True))[::-1])

    def by_name(o, saved):
        where = {n: i for i, n in enumerate(saved["param_groups"][0]["param_names"])}
        wanted = o.param_groups[0]["param_names"]
        state = {i: saved["state"][where[n]] for i, n in enumerate(wanted)}
        return {**saved, "state": state}

    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(saved)
    for param in side.params:
        assert other.state[param]["square_avg"].shape == param.shape


def test_loading_after_the_parameters_have_grown():
    """A checkpoint without state for a parameter: it starts anew."""
    saved = build(RMSprop)
    saved.set_gradients(0)
    saved.params[3].grad = None
    saved.opt.step()
    sides = [resume(cls, saved, saved.opt.state_dict()) for cls in CLASSES]
    for side in sides:
        side.params[3].grad = normal(1, side.params[3].shape)
        side.train([1])
    assert_same(*sides)
    assert [int(state["step"]) for state in sides[1].state()] == [2, 2, 2, 1]


def test_a_hook_may_unpack_a_checkpoint():
    """It is the first to see what was loaded; arrays that it brings are taken like all others."""
    param = torch.ones(3, requires_grad=True)
    opt = RMSprop([param])
    param.grad = torch.ones(3)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["square_avg"] = saved["state"][0]["square_avg"].numpy()
    opt.register_load_state_dict_pre_hook(lambda _, found: found["optimizer"])
    opt.load_state_dict({"optimizer": saved})
    assert torch.equal(opt.state[param]["square_avg"], torch.full((3,), 0.01))
