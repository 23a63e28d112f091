"""Promise: `rmsprop.torch.RMSprop` computes what `torch.optim.RMSprop` does up to rounding, and our own rule to the bit."""

import numpy as np
import pytest
import rmsprop
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle
from problems import bits as array_bits
from rmsprop.torch import RMSprop
from torch_pairs import (
    FORMS,
    OWN,
    Side,
    Stock,
    assert_close,
    assert_same,
    both,
    normal,
    parameters,
    train_both,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
FOREACH = pytest.mark.parametrize("foreach", [None, False, True])
form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def twins(seed, numel, dtype, warm, **options):
    """Stock after some steps, and ours in exactly the same state."""
    stock = Side(parameters(seed, [(numel,)], dtype), None)
    stock.opt = Stock(stock.params, **options)
    stock.train(range(warm))
    ours = Side([p.detach().clone().requires_grad_() for p in stock.params], None)
    ours.opt = RMSprop(ours.params, **options)
    ours.opt.load_state_dict(stock.opt.state_dict())
    for state in ours.state():  # the loaded tensors are stock's own
        for key, value in state.items():
            state[key] = value.clone()
    return stock, ours


def step_apart(ours, stock):
    """How many numbers of the type lie between two tensors, element by element."""
    kind = np.int32 if ours.dtype == torch.float32 else np.int64
    a, b = (t.detach().numpy().view(kind).astype(object) for t in (ours, stock))
    low = int(np.iinfo(kind).min)
    a, b = (np.where(x < 0, low - x, x) for x in (a, b))
    return np.abs(a - b)


def arrays(tensors):
    """The memory of the tensors."""
    return [tensor.detach().numpy() for tensor in tensors]


# --- one step ---------------------------------------------------------------------------------


@DTYPES
@FOREACH
@pytest.mark.parametrize("warm", [0, 1, 20])
@pytest.mark.parametrize("lr", [1e-4, 1e-3, 1e-2])
def test_plain_step_is_within_one_ulp(dtype, foreach, warm, lr):
    """Of steps below an eighth of the parameter; of any step see the next test."""
    options = {"lr": lr, "alpha": 0.9, "foreach": foreach}
    stock, ours = twins(warm, 2003, dtype, warm, **options)
    before = stock.params[0].detach().clone()
    for side in (stock, ours):
        side.train([1234])
    moved = (stock.params[0] - before).abs().detach()
    small = moved <= before.abs() / 8
    assert small.float().mean() > 0.5
    apart = step_apart(ours.params[0], stock.params[0])
    assert max(apart[small.numpy()]) <= 1
    averages = [side.state()[0]["square_avg"] for side in (ours, stock)]
    assert max(step_apart(*averages)) <= 1


ULPS = 8  # A step is at most a dozen roundings; not all of them err in one direction.


def magnitudes(param, grad, state, after, o):
    """The rule with every term taken as positive: what rounding errors scale with.

    `condition` is what the subtractions under the root, of which `after` knows the
    result, do to an error: the ratio of the terms to their difference.
    """
    p, g = param.abs().double(), grad.abs().double()
    v, m, b = (
        state.get(key, torch.zeros_like(p)).abs().double()
        for key in ("square_avg", "grad_avg", "momentum_buffer")
    )
    alpha, momentum = o["alpha"], o.get("momentum", 0)
    g = g + o.get("weight_decay", 0) * p
    v = alpha * v + (1 - alpha) * g * g
    m = alpha * m + (1 - alpha) * g
    d, terms = after["square_avg"].double(), v
    if o.get("centered"):
        d = (d - after["grad_avg"].double() ** 2).clamp(min=0)
        terms = v + m * m
    condition = 1 + terms / d
    u = condition * g / (d.sqrt() + o["eps"])
    b = momentum * b + u if momentum else u
    return {
        "param": p + o["lr"] * b,
        "square_avg": v,
        "grad_avg": m,
        "momentum_buffer": b,
    }


@given(
    form=st.sampled_from(list(FORMS.values())),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    foreach=st.sampled_from([None, False, True]),
    numel=st.integers(1, 100),
    warm=st.integers(0, 5),
    lr=st.floats(1e-6, 10),
    alpha=st.floats(0.05, 0.999),
    eps=st.sampled_from([1e-10, 1e-8, 1e-3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_step_is_within_its_rounding(
    form, dtype, foreach, numel, warm, lr, alpha, eps, seed
):
    """From the same state, whatever the form, each element of each tensor."""
    options = {**form, "lr": lr, "alpha": alpha, "eps": eps}
    stock, ours = twins(seed, numel, dtype, warm, **options, foreach=foreach)
    param = stock.params[0].detach().clone()
    state = {key: value.clone() for key, value in stock.state()[0].items()}
    train_both((stock, ours), [1234])
    results = [
        {"param": side.params[0].detach(), **side.state()[0]} for side in (stock, ours)
    ]
    assert results[0].pop("step") == results[1].pop("step") == warm + 1
    scale = magnitudes(param, stock.params[0].grad, state, results[0], options)
    eps_of_type = torch.finfo(dtype).eps
    assert results[0].keys() == results[1].keys()
    for key, its in results[0].items():
        error = (results[1][key].double() - its.double()).abs()
        assert (error <= ULPS * eps_of_type * scale[key]).all(), key


# --- many steps -------------------------------------------------------------------------------


@form
@DTYPES
def test_a_thousand_steps(form, dtype):
    """Within 1/50 ulp a step of the largest magnitude that the element has had.

    The gradients are given, not computed from the parameters, so errors add up without
    being amplified; lr moves.
    """
    steps = 1000
    sides = both(shapes=[(101,)], dtype=dtype, **form)
    grads = normal(0, (steps, 101), dtype)
    largest = torch.zeros(101, dtype=dtype)
    for t in range(steps):
        for side in sides:
            side.opt.param_groups[0]["lr"] = 0.01 * 0.997**t
            side.params[0].grad = grads[t]
            side.opt.step()
        largest = torch.maximum(largest, sides[0].params[0].detach().abs())
    error = (sides[0].params[0] - sides[1].params[0]).abs().detach()
    ulp = torch.from_numpy(np.spacing(largest.numpy()))
    assert (error / ulp).max() <= 0.02 * steps
    assert_same(*sides)


@form
@FOREACH
@pytest.mark.parametrize("lr", [1e-3, 0.0, 1])
@pytest.mark.parametrize("eps", [1e-8, 0.0, 1e-2])
def test_hyperparameters(form, foreach, lr, eps):
    sides = both(lr=lr, eps=eps, alpha=0.9, foreach=foreach, **form)
    train_both(sides, range(4))
    assert_same(*sides)


@form
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_edges_of_alpha(form, alpha):
    """At 1 nothing is averaged and steps divide by eps alone."""
    sides = both(alpha=alpha, eps=1e-2, **form)
    train_both(sides, range(3))
    if form.get("centered") and alpha == 0:
        return  # the variance is 0 up to rounding: torch takes the root of noise
    assert_same(*sides)


def test_groups_are_independent_optimizers():
    options = list(FORMS.values())
    shapes = [(5, 2)] * len(options)
    for cls in (Stock, RMSprop):
        grouped = Side(parameters(0, shapes), None)
        grouped.opt = cls(
            [{"params": [p], **o} for p, o in zip(grouped.params, options, strict=True)]
        )
        alone = Side(parameters(0, shapes), None)
        optimizers = [cls([p], **o) for p, o in zip(alone.params, options, strict=True)]
        grouped.train(range(3))
        for seed in range(3):
            alone.set_gradients(seed)
            for opt in optimizers:
                opt.step()
        assert all(map(torch.equal, grouped.params, alone.params))


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan"), 0.0])
@form
def test_special_gradients(form, special):
    """Infinities and NaNs go where torch's go, zeros too."""
    sides = both(**form)
    train_both(sides, range(2))
    for side in sides:
        side.set_gradients(2)
        side.params[0].grad[1, 2] = special
        side.params[2].grad.fill_(special)
        side.opt.step()
    assert_same(*sides)
    train_both(sides, [3])  # torch makes NaN of an infinite grad_avg here, we keep it
    assert_close(sides[1].params, sides[0].params)


# --- layouts ----------------------------------------------------------------------------------


def strided(shape, dtype):
    """A view of every second element of a larger tensor."""
    return torch.empty(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


LAYOUTS = {
    "contiguous": lambda d: torch.empty(4, 5, dtype=d),
    "transposed": lambda d: torch.empty(5, 4, dtype=d).t(),
    "permuted": lambda d: torch.empty(3, 4, 5, dtype=d).permute(2, 0, 1),
    "channels last": lambda d: torch.empty(2, 3, 4, 5, dtype=d).contiguous(
        memory_format=torch.channels_last
    ),
    "scalar": lambda d: torch.empty((), dtype=d),
    "one element": lambda d: torch.empty(1, 1, dtype=d),
    "empty": lambda d: torch.empty(0, 3, dtype=d),
    "strided": lambda d: strided((4, 5), d),
    "columns": lambda d: torch.empty(6, 9, dtype=d)[1:5, 2:7],
    "offset": lambda d: torch.empty(21, dtype=d)[1:],
    "long": lambda d: torch.empty(3, 4001, dtype=d),
}
layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)

GRADIENTS = {
    "like the parameter": torch.Tensor.clone,
    "contiguous": torch.Tensor.contiguous,
    "strided": lambda g: strided((*g.shape, 1), g.dtype).copy_(g[..., None])[..., 0],
    "expanded": lambda g: torch.ones((), dtype=g.dtype).expand(g.shape),
}


def laid_out(seed, make, dtype):
    param = make(dtype)
    param.copy_(normal(seed, param.shape, dtype))
    return param.requires_grad_()


@layout
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("form", [FORMS["plain"], FORMS["all"]], ids=["plain", "all"])
@DTYPES
def test_layouts(layout, gradient, form, dtype):
    """As torch up to rounding, state of the same strides; as the rule to the bit."""
    sides = []
    for cls in (Stock, RMSprop):
        params = [laid_out(i, layout, dtype) for i in range(2)]
        sides.append(Side(params, cls(params, **form)))
    oracle = Oracle([a.copy() for a in arrays(params)], **torch_dialect(form))
    for seed in range(3):
        for side in sides:
            side.set_gradients(seed)
            for param in side.params:
                param.grad = gradient(param.grad)
            side.opt.step()
        oracle.step([param.grad.numpy() for param in params])
    assert_same(*sides)
    assert array_bits(arrays(params)) == array_bits(oracle.params)


def test_nothing_beside_a_view_is_written():
    base = normal(0, (6, 9))
    before = base.clone()
    params = [base[1:5, 2:7].requires_grad_()]
    Side(params, RMSprop(params)).train(range(2))
    changed = base.detach() != before
    assert changed[1:5, 2:7].all()
    assert changed.sum() == 20


# --- our own options --------------------------------------------------------------------------


def torch_dialect(options):
    """Arguments of the torch front as those of the oracle, whose defaults are OneFlow's."""
    return {"lr": 0.01, **rmsprop.dialect("torch"), **options}


def positive(limit):
    return st.sampled_from([0.0, 1e-300, 1e-45]) | st.floats(0, limit)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "lr": positive(1e3),
        "alpha": st.sampled_from([0.0, 0.9, 0.99]) | st.floats(0, 1, exclude_max=True),
        "eps": positive(10),
        "weight_decay": positive(10),
        "momentum": positive(2),
        "initial_square_avg": positive(10),
        "max_grad_norm": st.floats(1e-3, 10),
        "foreach": st.sampled_from([None, False, True]),
        **dict.fromkeys(["centered", "maximize"], st.booleans()),
        **{key: st.booleans() for key, value in OWN.items() if value is True},
        "clip_weights": st.sampled_from([None, 1e-45, 0.1]),
        "ema_decay": st.none() | st.floats(0, 1),
    },
)


def follow_oracle(options, dtype, shapes, steps, seed=0, **more):
    """Train and compare with the oracle's copies of the parameters, bit for bit."""
    params = parameters(seed, shapes, dtype)
    wanted = torch_dialect(options)
    wanted.pop("foreach", None)
    oracle = Oracle([a.copy() for a in arrays(params)], **wanted)
    side = Side(params, RMSprop(params, **options, **more))
    for step in range(steps):
        side.set_gradients((seed, step))
        side.opt.step()
        norm = getattr(side.opt, "last_grad_norm", None)
        oracle.step([p.grad.numpy() for p in params], grad_norm=norm)
        if oracle.last_grad_norm is not None:
            exact = [p.grad.double().flatten() for p in params]
            assert norm == pytest.approx(float(torch.cat(exact).norm()), rel=1e-12)
    assert array_bits(arrays(params)) == array_bits(oracle.params)
    for state, wanted_state in zip(side.state(), oracle.state.values(), strict=True):
        assert set(state) == set(wanted_state)
        assert int(state["step"]) == wanted_state["step"]
        for key in set(state) - {"step"}:
            assert array_bits(state[key].numpy()) == array_bits(wanted_state[key]), key


@given(
    options=OPTIONS,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shapes=st.lists(
        st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=3
    ),
    steps=st.integers(1, 4),
    threads=st.sampled_from([None, 1, 3]),
    contiguous_params=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_option_follows_the_rule(
    options, dtype, shapes, steps, threads, contiguous_params, seed
):
    follow_oracle(
        options,
        dtype,
        shapes,
        steps,
        seed,
        threads=threads,
        contiguous_params=contiguous_params,
    )


@pytest.mark.parametrize(
    "name",
    [
        *("oneflow", "torch", "timm", "sb3", "keras", "tf1", "optax", "paddle"),
        *("mlx", "graves", "mindspore", "chainer", "burn", "dfdx"),
    ],
)
@DTYPES
def test_dialects(name, dtype):
    follow_oracle(rmsprop.dialect(name, lr=0.01), dtype, [(4, 5), (7,)], 5)


# (An average changes nothing but itself.)
@pytest.mark.parametrize("option", [key for key in OWN if key != "ema_decay"])
def test_each_option_changes_the_numbers(option):
    """A test of the tests above: none of them would pass with the option ignored."""
    options = {"momentum": 0.9, "weight_decay": 0.1, "eps": 0.1}
    results = []
    for own in ({}, {option: OWN[option]}):
        params = parameters(0)
        Side(params, RMSprop(params, **options, **own)).train(range(3))
        results.append(params)
    assert not any(map(torch.equal, *results))


def test_options_of_a_group():
    """Every option that shapes the rule can differ from group to group."""
    params = parameters(0, [(3, 4)] * (len(OWN) + 1))
    base = {"momentum": 0.9, "weight_decay": 0.1}
    groups = [{}, *({key: value} for key, value in OWN.items())]
    opt = RMSprop(
        [{"params": [p], **g} for p, g in zip(params, groups, strict=True)], **base
    )
    Side(params, opt).train(range(3))
    for index, group in enumerate(groups):
        alone = parameters(0, [(3, 4)] * len(params))
        side = Side(alone, RMSprop([alone[index]], **base, **group))
        side.train(range(3))
        assert torch.equal(alone[index], params[index])


# --- clipping and non-finite gradients --------------------------------------------------------


def test_max_grad_norm_is_clip_grad_norm_before_the_step():
    """Over all groups, as `clip_grad_norm_` over all parameters; gradients stay as they are."""
    stock = Side(parameters(0), None)
    stock.opt = Stock([{"params": [p]} for p in stock.params])
    ours = Side(parameters(0), None)
    ours.opt = RMSprop([{"params": [p]} for p in ours.params], max_grad_norm=0.5)
    for seed in range(5):
        stock.set_gradients(seed)
        norm = torch.nn.utils.clip_grad_norm_(stock.params, 0.5)
        stock.opt.step()
        ours.set_gradients(seed)
        kept = [p.grad.clone() for p in ours.params]
        ours.opt.step()
        assert all(map(torch.equal, [p.grad for p in ours.params], kept))
        assert ours.opt.last_grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert_same(stock, ours)


def poisoned(**options):
    params = parameters(0)
    side = Side(params, RMSprop(params, momentum=0.9, **options))
    side.train(range(2))
    side.set_gradients(2)
    params[1].grad[3] = float("nan")
    return side


def test_skip_changes_nothing_and_counts():
    side = poisoned(nonfinite="skip")
    before = [p.detach().clone() for p in side.params]
    averages = [s["square_avg"].clone() for s in side.state()]
    side.opt.step()
    assert side.opt.skipped_steps == 1
    assert all(map(torch.equal, side.params, before))
    assert all(map(torch.equal, [s["square_avg"] for s in side.state()], averages))
    assert [int(s["step"]) for s in side.state()] == [2] * 4
    side.train([3])
    assert side.opt.skipped_steps == 1
    assert [int(s["step"]) for s in side.state()] == [3] * 4


def test_raise_changes_nothing_and_names_the_gradient():
    side = poisoned(nonfinite="raise")
    before = [p.detach().clone() for p in side.params]
    with pytest.raises(FloatingPointError, match="gradient"):
        side.opt.step()
    assert all(map(torch.equal, side.params, before))
    assert [int(s["step"]) for s in side.state()] == [2] * 4


def test_propagate_is_the_default():
    side = poisoned()
    side.opt.step()
    assert side.params[1].isnan().sum() == 1
