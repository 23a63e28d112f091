"""Promise: `rmsprop.torch.RMSprop` accepts and refuses exactly what `torch.optim.RMSprop` does, in the same words."""

import inspect

import numpy as np
import pytest
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
    outcome,
    parameters,
    snapshot,
    train_both,
)

OWN_DEFAULTS = {
    "eps_in_sqrt": False,
    "initial_square_avg": 0.0,
    "lr_in_momentum": False,
    "nesterov": False,
    "bias_correction": False,
    "decoupled_weight_decay": False,
    "cautious_weight_decay": False,
    "corrected_weight_decay": False,
    "clip_weights": None,
    "ema_decay": None,
    "max_grad_norm": None,
    "nonfinite": "propagate",
    "contiguous_params": False,
    "threads": None,
    "state_dtype": None,
    "rounding": "nearest",
    "master_weight_bits": None,
    "seed": 0,
}


def leaf(*shape):
    return torch.ones(shape).requires_grad_()


# --- signature --------------------------------------------------------------------------------


def test_same_positional_arguments_then_our_own_by_keyword():
    stock, ours = (list(inspect.signature(cls).parameters.values()) for cls in CLASSES)
    shared, own = ours[: len(stock)], ours[len(stock) :]
    assert [(p.name, p.kind, p.default) for p in shared] == [
        (p.name, p.kind, p.default) for p in stock
    ]
    assert {p.name: p.default for p in own} == OWN_DEFAULTS
    assert {p.kind for p in own} == {inspect.Parameter.KEYWORD_ONLY}


def test_positional_arguments_arrive_where_torchs_do():
    given = (0.5, 0.8, 1e-4, 0.1, 0.7, True, False, False, True, False)
    stock, ours = (cls([leaf(3)], *given) for cls in CLASSES)
    assert list(stock.defaults.items()) == list(ours.defaults.items())
    assert [dict(g, params=0) for g in stock.param_groups] == [
        dict(g, params=0) for g in ours.param_groups
    ]


def test_it_is_an_optimizer_of_torch():
    opt = RMSprop([leaf(3)])
    assert isinstance(opt, torch.optim.Optimizer)
    assert type(opt).__name__ == "RMSprop"


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_repr_is_torchs(form):
    stock, ours = both(**form)
    assert repr(ours.opt) == repr(stock.opt)


def test_step_has_torchs_signature():
    stock, ours = (inspect.signature(cls([leaf(3)]).step) for cls in CLASSES)
    assert list(ours.parameters) == list(stock.parameters) == ["closure"]
    assert ours.parameters["closure"].default is None


# --- refused ----------------------------------------------------------------------------------

FRONT, BACK = leaf(3), leaf(2)

REFUSED = {
    "tensor": lambda cls: cls(FRONT),
    "nothing": lambda cls: cls(),
    "none": lambda cls: cls(None),
    "empty": lambda cls: cls([]),
    "exhausted": lambda cls: cls(iter(())),
    "no tensors": lambda cls: cls([1.0, 2.0]),
    "array": lambda cls: cls([np.ones(3)]),
    "string": lambda cls: cls("abc"),
    "non-leaf": lambda cls: cls([FRONT * 2]),
    "group without params": lambda cls: cls([{"lr": 0.1}]),
    "set in a group": lambda cls: cls([{"params": {FRONT, BACK}}]),
    "groups that share": lambda cls: cls([{"params": FRONT}, {"params": [FRONT]}]),
    "groups and tensors": lambda cls: cls([{"params": FRONT}, BACK]),
    "tensors and groups": lambda cls: cls([FRONT, {"params": BACK}]),
    "half the names": lambda cls: cls([("front", FRONT), BACK]),
    "names only in the second group": lambda cls: cls(
        [{"params": [FRONT]}, {"params": [("back", BACK)]}]
    ),
    "names only in the first group": lambda cls: cls(
        [{"params": [("front", FRONT)]}, {"params": [BACK]}]
    ),
    "lr of two elements": lambda cls: cls([FRONT], lr=torch.tensor([0.1, 0.2])),
    "lr of no element": lambda cls: cls([FRONT], lr=torch.tensor([])),
    "unknown keyword": lambda cls: cls([FRONT], fused=True),
    "lr twice": lambda cls: cls([FRONT], 0.1, lr=0.1),
    "too many positions": lambda cls: cls([FRONT], *[0.0] * 10, None),
    "group that is no dict": lambda cls: cls([FRONT]).add_param_group([BACK]),
    "group added twice": lambda cls: cls([FRONT]).add_param_group({"params": FRONT}),
    "named group added": lambda cls: cls([FRONT]).add_param_group(
        {"params": [("back", BACK)]}
    ),
    "unnamed group added": lambda cls: cls([("front", FRONT)]).add_param_group(
        {"params": [BACK]}
    ),
    "string added": lambda cls: cls([FRONT]).add_param_group({"params": ["back"]}),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_refused_in_the_same_words(make):
    stock = outcome(make, Stock)
    assert stock, "torch accepts this"
    assert outcome(make, RMSprop) == stock


def test_a_refused_group_is_not_added():
    for cls in CLASSES:
        opt = cls([FRONT])
        assert outcome(opt.add_param_group, {"params": [FRONT, BACK]})
        assert [group["params"] for group in opt.param_groups] == [[FRONT]]


VALUES = {
    "minus one": -1.0,
    "minus zero": -0.0,
    "minus a little": -1e-30,
    "zero": 0,
    "true": True,
    "two": 2,
    "one and a half": 1.5,
    "subnormal": 5e-324,
    "float32": np.float32(0.1),
    "float64": np.float64(0.1),
    "int64": np.int64(1),
    "huge": 1e300,
    "inf": float("inf"),
    "minus inf": float("-inf"),
    "nan": float("nan"),
    "string": "0.1",
    "none": None,
    "list": [0.1],
    "complex": 0.1j,
    "tensor": torch.tensor(0.1),
    "tensor of one": torch.tensor([0.1]),
    "double tensor": torch.tensor(0.1, dtype=torch.float64),
    "int tensor": torch.tensor(1),
    "negative tensor": torch.tensor(-0.1),
}


def construct_and_step(cls, place, name, value):
    """Set one argument, in the call, in a group or later: what that says, and a step."""
    options = {"weight_decay": 0.1} | ({"momentum": 0.5} if name == "momentum" else {})
    side = Side([normal(0, (4, 3)).requires_grad_()], None)

    def construct():
        if place == "call":
            side.opt = cls(side.params, **{**options, name: value})
        elif place == "group":
            side.opt = cls([{"params": side.params, name: value}], **options)
        else:
            side.opt = cls(side.params, **options)
            side.opt.param_groups[0][name] = value

    said = outcome(construct)
    return said, said or outcome(side.train, range(2)), side.params[0].detach()


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", ["lr", "alpha", "eps", "weight_decay", "momentum"])
def test_every_number_in_the_call(name, value):
    """Refused in the same words, or accepted; where torch can step, the same numbers.

    Some of what torch accepts only fails in a step, for want of a conversion: 1e300 in
    float32, or True as weight decay. A step of ours may succeed there.
    """
    stock, ours = (construct_and_step(cls, "call", name, value) for cls in CLASSES)
    assert ours[0] == stock[0]
    if not stock[1]:
        assert not ours[1]
        assert_close([ours[2]], [stock[2]])


UNCHECKED = ("minus one", "zero", "two", "inf", "float32", "tensor", "int tensor")


@pytest.mark.parametrize("key", UNCHECKED)
@pytest.mark.parametrize("place", ["group", "later"])
@pytest.mark.parametrize("name", ["lr", "alpha", "eps", "weight_decay"])
def test_numbers_that_torch_does_not_check(name, place, key):
    """In a group and between steps torch takes any number, a negative lr to climb too."""
    stock, ours = (construct_and_step(cls, place, name, VALUES[key]) for cls in CLASSES)
    assert ours[:2] == stock[:2] == ([], [])
    assert_close([ours[2]], [stock[2]])


FLAGS = ("centered", "maximize", "foreach", "differentiable", "capturable")


@pytest.mark.parametrize("value", [0, 1, None, "yes", ""], ids=repr)
@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_whatever_is_true(name, value):
    """What torch says of a capturable step on the CPU included."""
    results = []
    for cls in CLASSES:
        params = [normal(0).requires_grad_(name != "differentiable")]
        side = Side(params, None)

        def run(cls=cls, params=params, side=side):
            side.opt = cls(params, **{name: value})
            side.train(range(2))

        results.append((outcome(run), params[0].detach()))
    assert results[1][0] == results[0][0]
    assert_close([results[1][1]], [results[0][1]])


# --- refused by a step ------------------------------------------------------------------------


def sparse_gradient(cls):
    params = [leaf(3)]
    opt = cls(params, capturable=True)
    params[0].grad = torch.ones(3).to_sparse()  # torch takes none
    opt.step()


def capturable_on_the_cpu(cls):
    build(cls, capturable=True).train([0])


def differentiable_foreach(cls):
    param = torch.ones(3)
    param.grad = torch.ones(3)
    cls([param], differentiable=True, foreach=True).step()


def overlapping_itself(cls):
    param = torch.ones(1).expand(3).requires_grad_()
    opt = cls([param])
    param.grad = torch.ones(3)
    opt.step()


@pytest.mark.parametrize(
    "make",
    [
        sparse_gradient,
        capturable_on_the_cpu,
        differentiable_foreach,
        overlapping_itself,
    ],
)
def test_steps_refused_in_the_same_words(make):
    stock = outcome(make, Stock)
    assert stock, "torch accepts this"
    assert outcome(make, RMSprop) == stock


# --- accepted ---------------------------------------------------------------------------------


def test_a_duplicate_in_a_group_is_warned_of_and_stepped_twice():
    results = []
    for cls in CLASSES:
        params = [normal(0).requires_grad_()]
        with pytest.warns(UserWarning, match="duplicate parameters"):
            opt = cls([params[0], params[0]])
        side = Side(params, opt)
        side.train(range(2))
        assert side.state()[0]["step"] == 4
        results.append(side)
    assert_same(*results)


def test_a_set_is_warned_of():
    sides = []
    for cls in CLASSES:
        params = parameters(0)
        with pytest.warns(FutureWarning, match="ordered collections"):
            opt = cls(set(params))
        sides.append(Side(params, opt))
    train_both(sides, range(2))
    assert_same(*sides)


def test_parameters_that_overlap():
    """torch steps one after the other; so do we."""
    sides = []
    for cls in CLASSES:
        base = normal(0, (6,))
        params = [base[:4].requires_grad_(), base[2:].detach().requires_grad_()]
        sides.append(Side(params, cls(params, weight_decay=0.1)))
    train_both(sides, range(3))
    assert_same(*sides)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_gradient_in_the_memory_of_its_parameter(form):
    sides = both(**form)
    for _ in range(3):
        for side in sides:
            for param in side.params:
                param.grad = param.detach()
            side.opt.step()
    assert_same(*sides)


def test_a_gradient_shared_by_parameters():
    sides = both(shapes=[(3, 2), (3, 2)])
    for side in sides:
        side.params[0].grad = side.params[1].grad = normal(5, (3, 2))
        side.opt.step()
    assert_same(*sides)


def test_generators_are_read_once():
    """Of parameters, of named ones, of groups, and inside a group."""
    for cls in CLASSES:
        params = parameters(0)
        assert cls(p for p in params).param_groups[0]["params"] == params
        pairs = ((str(i), p) for i, p in enumerate(params))
        group = cls(pairs).param_groups[0]
        assert (group["params"], group["param_names"]) == (params, list("0123"))
        opt = cls({"params": (p for p in [q])} for q in params)
        assert [g["params"] for g in opt.param_groups] == [[p] for p in params]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_tensor_lr(shape, foreach, dtype):
    """Kept as it is, read at every step: written in place it counts."""
    sides = []
    for cls in CLASSES:
        lr = torch.full(shape, 1, dtype=dtype)
        side = build(cls, lr=lr, foreach=foreach, momentum=0.5)
        assert side.opt.param_groups[0]["lr"] is lr
        assert side.opt.defaults["lr"] is lr
        side.train(range(2))
        lr.mul_(3)
        side.train(range(2, 4))
        sides.append(side)
    assert_same(*sides)


def test_a_tensor_lr_is_the_number_it_holds():
    lr = torch.tensor(0.003)
    one, two = build(RMSprop, lr=lr), build(RMSprop, lr=lr.item())
    train_both((one, two), range(3))
    assert snapshot(one) == snapshot(two)


def test_named_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    for cls in CLASSES:
        opt = cls(model.named_parameters())
        assert opt.param_groups[0]["params"] == list(model.parameters())
        names = ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert opt.param_groups[0]["param_names"] == names
        assert opt.state_dict()["param_groups"][0]["param_names"] == names
        named = list(model.named_parameters())
        opt = cls([{"params": named[:1]}, {"params": named[1:], "lr": 0.5}])
        assert [g["param_names"] for g in opt.param_groups] == [names[:1], names[1:]]


def test_a_group_fills_in_defaults_and_keeps_its_own_keys():
    stock, ours = (
        cls(
            [{"params": FRONT, "lr": 0.5, "color": "red"}, {"params": BACK}],
            alpha=0.7,
            momentum=0.9,
        )
        for cls in CLASSES
    )
    assert ours.param_groups == stock.param_groups
    assert [list(g) for g in ours.param_groups] == [list(g) for g in stock.param_groups]


def test_a_group_added_later():
    sides = both()
    train_both(sides, range(2))
    for side in sides:
        side.params.append(normal(9, (2, 2)).requires_grad_())
        group = {"params": side.params[-1], "momentum": 0.9}
        side.opt.add_param_group(group)
        assert group is side.opt.param_groups[1]  # torch completes the caller's dict
        assert side.opt.param_groups[1]["lr"] == 0.01
    train_both(sides, range(2, 4))
    assert_same(*sides)
    assert [int(state["step"]) for state in sides[1].state()] == [4, 4, 4, 4, 2]


# --- changed between steps --------------------------------------------------------------------

EDITS = {
    "lr": {"lr": 0.5},
    "alpha": {"alpha": 0.5},
    "eps": {"eps": 0.1},
    "weight decay on": {"weight_decay": 0.5},
    "maximize": {"maximize": True},
    "foreach": {"foreach": True},
    "momentum": {"momentum": 0.3},
    "momentum off": {"momentum": 0},
    "momentum a tensor": {"momentum": torch.tensor(0.3)},
    "centered off": {"centered": False},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_count_from_the_next_step(edit):
    sides = both(momentum=0.9, centered=True)
    unedited = build(RMSprop, momentum=0.9, centered=True)
    train_both((*sides, unedited), range(2))
    for side in sides:
        side.opt.param_groups[0].update(edit)
    train_both((*sides, unedited), range(2, 4))
    assert_same(*sides)
    if "foreach" not in edit:
        assert snapshot(sides[1]) != snapshot(unedited)


@pytest.mark.parametrize(
    ("edit", "key"),
    [({"momentum": 0.9}, "momentum_buffer"), ({"centered": True}, "grad_avg")],
)
def test_state_switched_on_later_starts_at_zero(edit, key):
    """torch stops with a KeyError here; it is helped with the state it lacks."""
    stock, ours = both()
    train_both((stock, ours), range(2))
    for side in (stock, ours):
        side.opt.param_groups[0].update(edit)
    for state, param in zip(stock.state(), stock.params, strict=True):
        state[key] = torch.zeros_like(param)
    train_both((stock, ours), range(2, 5))
    assert_same(stock, ours)


def test_state_switched_off_is_kept():
    side = build(RMSprop, momentum=0.9, centered=True)
    side.train(range(2))
    kept = bits([(s["momentum_buffer"], s["grad_avg"]) for s in side.state()])
    side.opt.param_groups[0].update(momentum=0.0, centered=False)
    side.train(range(2, 4))
    assert bits([(s["momentum_buffer"], s["grad_avg"]) for s in side.state()]) == kept


# --- our own options --------------------------------------------------------------------------

BAD = [
    ("initial_square_avg", -1.0),
    ("initial_square_avg", float("nan")),
    ("initial_square_avg", float("inf")),
    ("max_grad_norm", 0.0),
    ("max_grad_norm", -1.0),
    ("max_grad_norm", float("nan")),
    ("nonfinite", "ignore"),
    ("threads", 0),
    ("threads", -2),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_of_our_own_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        RMSprop([leaf(3)], **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial_square_avg", "one"),
        ("max_grad_norm", "one"),
        ("nonfinite", 3),
        ("threads", "two"),
    ],
)
def test_values_of_another_type_are_named(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        RMSprop([leaf(3)], **{name: value})


def test_bias_correction_needs_an_average():
    with pytest.raises(ValueError, match="alpha"):
        RMSprop([leaf(3)], alpha=1.0, bias_correction=True)


def test_bad_values_in_a_group_are_named():
    bad = {"params": leaf(3), "initial_square_avg": -1.0}
    with pytest.raises(ValueError, match="initial_square_avg"):
        RMSprop([bad])
    opt = RMSprop([leaf(3)])
    with pytest.raises(ValueError, match="initial_square_avg"):
        opt.add_param_group(bad)
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(("name", "value"), [v for v in BAD if "square" not in v[0]])
def test_bad_values_later_are_named_and_change_nothing(name, value):
    side = build(RMSprop)
    side.train([0])
    before = snapshot(side)
    with pytest.raises(ValueError, match=name):
        setattr(side.opt, name, value)
        side.train([1])
    assert snapshot(side) == before


def test_our_own_options_have_no_positions():
    with pytest.raises(TypeError):
        RMSprop([leaf(3)], *[0.0] * 10, True)


def test_a_plain_optimizer_has_torchs_groups_only():
    """Tools that compare keys with torch's see no difference until an option is used."""
    stock, ours = both()
    assert list(ours.opt.param_groups[0]) == list(stock.opt.param_groups[0])
    assert list(ours.opt.defaults) == list(stock.opt.defaults)
    used = build(RMSprop, **OWN).opt.param_groups[0]
    assert {key: used[key] for key in OWN} == OWN
