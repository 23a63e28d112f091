"""Promise: state is made of ordinary tensors, as torch makes them, and whatever is changed between two steps counts at the next one."""

import copy
import gc
import weakref
from itertools import chain

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rmsprop.torch import RMSprop
from torch_pairs import (
    CLASSES,
    FORMS,
    Side,
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
CONTIGUOUS = pytest.mark.parametrize("contiguous_params", [False, True])


# --- how it is made ---------------------------------------------------------------------------


@form
def test_nothing_before_the_first_gradient(form):
    """State comes with it, parameter by parameter."""
    for cls in CLASSES:
        side = build(cls, **form)
        assert len(side.opt.state) == 0
        side.opt.step()
        assert len(side.opt.state) == 0
        side.params[1].grad = normal(0, (11,))
        side.opt.step()
        assert list(side.opt.state) == [side.params[1]]
        side.train([1])
        assert [int(state["step"]) for state in side.state()] == [1, 2, 1, 1]


@form
def test_types_of_state(form):
    sides = both(**form)
    train_both(sides, [0])
    for mine, its in zip(sides[1].state(), sides[0].state(), strict=True):
        assert type(mine) is type(its) is dict
        for key, value in mine.items():
            assert type(value) is type(its[key]) is torch.Tensor
            assert value.is_leaf
            assert value.device == its[key].device
    assert_same(*sides)


@pytest.mark.parametrize(
    "default", [torch.float64, torch.float32, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_step_follows_the_default_type(default, dtype):
    """It is double where that is the default, else single."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        sides = both(dtype=dtype, momentum=0.9)
        train_both(sides, range(2))
    finally:
        torch.set_default_dtype(before)
    train_both(sides, [2])
    assert_same(*sides)


def test_steps_are_counted_one_by_one_for_each_parameter():
    side = build(RMSprop)
    for seed in range(6):
        side.set_gradients(seed)
        for index, param in enumerate(side.params):
            if seed % (index + 1):
                param.grad = None
        side.opt.step()
    assert [int(state["step"]) for state in side.state()] == [6, 3, 2, 2]


def test_looking_at_state_creates_nothing():
    """`opt.state` is a defaultdict; an empty entry is filled in at the next step."""
    for cls in CLASSES:
        side = build(cls)
        assert side.opt.state[side.params[0]] == {}
        side.train([0])
        assert side.state()[0]["step"] == 1


# --- what counts at the next step -------------------------------------------------------------


def replace_data(side):
    for param in side.params:
        param.data = param.detach() * 2


def write_data(side):
    for param in side.params:
        param.data.mul_(2)


def copy_into(side):
    with torch.no_grad():
        for param in side.params:
            param.copy_(param * 2)


def resize(side):
    """A parameter that has dimensions and its state grow, as an embedding does."""
    for param in [param for param in side.params if param.dim() > 0][:1]:
        state = side.opt.state[param]
        param.data = torch.cat([param.data, param.data[:2] + 1])
        for key in set(state) - {"step"}:
            state[key] = torch.cat([state[key], torch.zeros_like(state[key][:2])])


def transpose(side):
    param = side.params[0]
    param.data = param.data.t().contiguous().t()


def share(side):
    for param in side.params:
        param.share_memory_()


def share_state(side):
    for state in side.state():
        for value in state.values():
            value.share_memory_()


def replace_state(side):
    for state in side.state():
        state["square_avg"] = state["square_avg"] * 3


def write_state(side):
    for state in side.state():
        state["square_avg"].mul_(3)
        state["step"].fill_(7)
        if "momentum_buffer" in state:
            state["momentum_buffer"].zero_()


def change_layout_of_state(side):
    state = side.opt.state[side.params[0]]
    state["square_avg"] = state["square_avg"].t().contiguous().t()


def clear_state(side):
    side.opt.state.clear()


def new_state(side):
    side.opt.state = type(side.opt.state)(dict)


def forget_one(side):
    del side.opt.state[side.params[1]]


def swap_a_parameter(side):
    """The new one starts anew. torch cannot save while the old one has state."""
    new = normal(50, (4, 2)).requires_grad_()
    old = side.opt.param_groups[0]["params"][0]
    side.opt.param_groups[0]["params"][0] = new
    side.opt.state.pop(old)
    side.params = [new if param is old else param for param in side.params]


def drop_a_parameter(side):
    """Not the last of its group."""
    listed = side.opt.param_groups[0]["params"]
    if len(listed) > 2:  # other edits need two
        dropped = listed.pop()
        side.opt.state.pop(dropped)
        side.params = [param for param in side.params if param is not dropped]


def append_a_parameter(side):
    side.params.append(normal(50, (4, 2)).requires_grad_())
    side.opt.param_groups[0]["params"].append(side.params[-1])


def reorder(side):
    side.opt.param_groups[0]["params"].reverse()


def split_a_group(side):
    group = side.opt.param_groups[0]
    half = (len(group["params"]) + 1) // 2
    moved = group["params"][half:]
    del group["params"][half:]
    side.opt.param_groups.append({**group, "params": moved, "lr": 0.5})


def replace_the_groups(side):
    side.opt.param_groups = [dict(g, lr=0.2) for g in side.opt.param_groups]


def freeze(side):
    side.params[-1].requires_grad_(False)


def drop_gradients(side):
    """The next step has none of its own."""
    side.opt.zero_grad()
    side.opt.step()


def reload(side):
    side.opt.load_state_dict(copy.deepcopy(side.opt.state_dict()))


def duplicate(side):
    side.params, side.opt = copy.deepcopy((side.params, side.opt))


def switch_options(side):
    group = side.opt.param_groups[0]
    group["maximize"] = not group["maximize"]
    group["weight_decay"] = 0.3 - group["weight_decay"]
    group["lr"] *= 0.5


def to_double(side):
    for param in side.params:
        param.grad = None
        param.data = param.data.double()


def to_double_with_state(side):
    to_double(side)
    for state in side.state():
        for key in set(state) - {"step"}:
            state[key] = state[key].double()


EDITS = [
    *(replace_data, write_data, copy_into, resize, transpose, share, share_state),
    *(replace_state, write_state, change_layout_of_state, clear_state, new_state),
    *(forget_one, swap_a_parameter, drop_a_parameter, append_a_parameter, reorder),
    *(split_a_group, replace_the_groups, freeze, drop_gradients, reload, duplicate),
    switch_options,
]
CONVERSIONS = [to_double_with_state]


@pytest.mark.parametrize("edit", EDITS + CONVERSIONS)
@pytest.mark.parametrize("foreach", [None, True])
@CONTIGUOUS
def test_edits_between_steps(edit, foreach, contiguous_params):
    """As torch's class takes them, also with parameters in one flat buffer."""
    options = FORMS["all"] | {"foreach": foreach}
    stock, _ = both(**options)
    ours = build(RMSprop, **options, contiguous_params=contiguous_params)
    sides = (stock, ours)
    train_both(sides, range(2))
    for side in sides:
        edit(side)
    train_both(sides, range(2, 4))
    assert len(ours.opt.state) == len(stock.opt.state)
    assert_same(*sides, rounded_as=torch.float32)


@given(
    edits=st.lists(st.sampled_from(EDITS), min_size=2, max_size=6),
    form=st.sampled_from(list(FORMS.values())),
    contiguous_params=st.booleans(),
)
@example([clear_state, switch_options, clear_state], FORMS["all"], False)
def test_any_sequence_of_edits(edits, form, contiguous_params):
    """A step after each.

    In float64: where weight decay nearly cancels a gradient, what is left has lost digits.
    """
    form = form | {"dtype": torch.float64}
    stock = build(CLASSES[0], **form)
    ours = build(CLASSES[1], **form, contiguous_params=contiguous_params)
    sides = (stock, ours)
    train_both(sides, [0])
    for seed, edit in enumerate(edits):
        for side in sides:
            edit(side)
        train_both(sides, [seed + 1])
    assert_same(*sides)


def test_state_of_another_type_than_its_parameter():
    """A model made double after some steps, its state left single: torch's mixture."""
    sides = both()
    train_both(sides, range(2))
    for side in sides:
        to_double(side)
    train_both(sides, range(2, 4))
    assert_same(*sides, rounded_as=torch.float32)


def test_modules_that_move_their_parameters():
    """`.double()`, `load_state_dict`, `to_empty`, `share_memory` between steps."""
    results = []
    for cls in CLASSES:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        opt = cls(model.parameters(), momentum=0.9)

        def step(model=model, opt=opt):
            opt.zero_grad()
            dtype = model.weight.dtype
            (model(normal(0, (5, 4), dtype)) ** 2).sum().backward()
            opt.step()

        step()
        saved = copy.deepcopy(model.state_dict())
        step()
        model.load_state_dict(saved)
        step()
        model.load_state_dict(saved, assign=False)
        model.share_memory()
        step()
        results.append([p.detach() for p in model.parameters()])
    assert_close(results[1], results[0])


def test_old_memory_is_left_alone():
    """What was replaced is neither written nor kept alive."""
    side = build(RMSprop, momentum=0.9)
    side.train(range(2))
    old = [param.detach() for param in side.params]
    old += [value for state in side.state() for value in state.values()]
    before = bits(old)
    for param in side.params:
        param.data = param.detach().clone()
    for state in side.state():
        state.update({key: value.clone() for key, value in state.items()})
    side.train([2])
    assert bits(old) == before


def test_gradients_that_come_and_go():
    sides = both(momentum=0.9)
    for seed in range(8):
        for side in sides:
            side.set_gradients(seed)
            for index, param in enumerate(side.params):
                if (seed >> index) & 1:
                    param.grad = None
            side.opt.step()
    assert_same(*sides)


def test_gradients_of_new_memory_at_every_step():
    """Nothing is remembered of where a gradient was."""
    sides = both(shapes=[(1000,)] * 3)
    for seed in range(5):
        for side in sides:
            junk = [torch.full((1000,), 99.0) for _ in range(seed)]
            side.train([seed])
            del junk
    assert_same(*sides)


def test_a_parameter_in_two_optimizers():
    """Each has its own state and sees what the other has done to the parameter."""
    results = []
    for cls in CLASSES:
        params = parameters(0)
        optimizers = [cls(params, lr=0.1), cls(params[:2], lr=0.01, momentum=0.9)]
        for seed in range(4):
            Side(params, optimizers[seed % 2]).train([seed])
        results += [[p.detach() for p in params]]
    assert_close(results[1], results[0])


def test_two_kinds_of_numbers_in_one_group():
    sides = []
    for cls in CLASSES:
        params = parameters(0, [(3,), (4, 2)])
        params += parameters(1, [(3,), (4, 2)], torch.float64)
        side = Side(params, cls(params, momentum=0.9, weight_decay=0.1))
        side.train(range(3))
        sides.append(side)
    assert_same(*sides)


@CONTIGUOUS
def test_snapshots_are_equal_whatever_the_memory(contiguous_params):
    """One flat buffer or not: the same bits, state in the same order."""
    one = build(RMSprop, **FORMS["all"])
    two = build(RMSprop, **FORMS["all"], contiguous_params=contiguous_params)
    train_both((one, two), range(4))
    assert snapshot(one) == snapshot(two)
    assert [list(state) for state in one.state()] == [list(s) for s in two.state()]


def test_flags_that_are_floats_count_when_they_change():
    sides = both()
    for side in sides:
        side.opt.param_groups[0]["maximize"] = 0.0
    train_both(sides, range(2))
    for side in sides:
        side.opt.param_groups[0]["maximize"] = 1.0
    train_both(sides, range(2, 4))
    assert_same(*sides)


def test_parameters_that_share_a_storage_stay_tied():
    """`contiguous_params` moves neither of them."""
    params = [torch.ones(4, requires_grad=True)]
    params.append(torch.nn.Parameter(params[0].data))
    RMSprop([*params, normal(0).requires_grad_()], contiguous_params=True)
    assert params[0].data_ptr() == params[1].data_ptr()


def test_a_default_device_is_not_where_parameters_are_moved():
    param = torch.ones(4, requires_grad=True)
    with torch.device("meta"):
        opt = RMSprop([param], contiguous_params=True)
    param.grad = torch.ones(4)
    opt.step()
    assert param.device.type == "cpu"
    assert bool((param < 1).all())


def test_strange_keys_of_state_are_left_alone():
    """Also those that no encoding knows."""
    sides = both()
    train_both(sides, range(1))
    for side in sides:
        for state in side.state():
            state["x\ud800"] = 1
    train_both(sides, range(1, 3))
    for side in sides:
        for state in side.state():
            assert state.pop("x\ud800") == 1
    assert_same(*sides)


@pytest.mark.parametrize("numel", [1, 100, 100_000])
def test_state_that_is_replaced_is_let_go(numel):
    """At the next step, and large tensors at once; all of it with the optimizer."""
    p = torch.nn.Parameter(torch.ones(numel))
    p.grad = torch.ones(numel)
    opt = RMSprop([p], momentum=0.9, centered=True)
    opt.step()
    opt.step()
    first = [weakref.ref(value) for value in opt.state[p].values()]
    opt.state[p] = {key: value.clone() for key, value in opt.state[p].items()}
    if numel == 100_000:
        assert sum(ref() is not None for ref in first) <= 1  # the count
    opt.step()
    assert all(ref() is None for ref in first)
    second = [weakref.ref(value) for value in opt.state[p].values()]
    assert len(second) == 4
    del opt
    gc.collect()
    assert all(ref() is None for ref in second)


@pytest.mark.parametrize("refer", ["attribute", "hook"])
def test_an_optimizer_that_its_parameter_refers_to_is_collected(refer):
    def make():
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        opt = RMSprop([p])
        opt.step()
        opt.step()
        match refer:
            case "attribute":
                p.owner = opt
            case "hook":
                p.register_hook(lambda grad: opt and None)
        return map(weakref.ref, (p, opt, opt.state[p]["square_avg"]))

    refs = list(make())
    gc.collect()
    assert all(ref() is None for ref in refs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "momentum": 0.9,
            "centered": True,
            "ema_decay": 0.9,
            "initial_square_avg": 1.0,
        },
        {"state_dtype": "uint8", "master_weight_bits": 32},
    ],
)
def test_init_state_makes_what_the_first_step_would(options):
    """All of it; what is there stays, and training is the same."""
    ends = []
    for early in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(5000, generator=generator).to(dtype))
            for dtype in (torch.float32, torch.bfloat16)
        ]
        opt = RMSprop(params, **options)
        if early:
            opt.init_state()
            made = [list(entry.values()) for entry in opt.state.values()]
            opt.init_state()
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
        found = [list(entry.values()) for entry in opt.state.values()]
        if early:
            pairs = zip(chain(*made), chain(*found), strict=True)
            assert all(one is other for one, other in pairs)
        ends.append([*params, *chain(*found)])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
