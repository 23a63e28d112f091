"""Parameters and state in fewer bits: the bits of the NumPy oracle, for all options, layouts, threads, instruction sets and both fronts."""

import copy

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import LINES_OF_THE_RULE, bits
from rmsprop import Parameter, RMSprop
from rmsprop.torch import RMSprop as TorchRMSprop
from storage_oracle import StoredOracle

PARAMETERS = ("float16", "bfloat16", "float32")
LENGTHS = (1, 7, 255, 256, 257, 511, 513, 1000, 4096, 4097, 9000)
KEYS = ("square_avg", "grad_avg", "momentum_buffer", "ema")
STORAGE = st.fixed_dictionaries(
    {},
    optional={
        "state_dtype": st.sampled_from([None, "float32", "bfloat16", "uint8"])
        | st.dictionaries(
            st.sampled_from(KEYS), st.sampled_from(["float32", "bfloat16", "uint8"])
        ),
        "rounding": st.sampled_from(["nearest", "stochastic"]),
        "master_weight_bits": st.sampled_from([None, 24, 32]),
        "seed": st.integers(0, 2**64 - 1),
        **LINES_OF_THE_RULE,
        "maximize": st.booleans(),
    },
)


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def possible(options, dtype):
    """Without what is refused."""
    options = dict(options)
    coarse = options.get("state_dtype")
    coarse = coarse if isinstance(coarse, dict) else dict.fromkeys(KEYS[:3], coarse)
    if "uint8" in (coarse.get("square_avg"), coarse.get("grad_avg")):
        options.pop("centered", None)
    if dtype == np.float16:
        options.pop("master_weight_bits", None)
    return options


def numbers(seed, numel, dtype, wild=False):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(numel) * 10.0 ** rng.integers(-4, 2, numel)
    if wild:
        special = rng.random(numel) < 0.02
        x[special] = rng.choice(
            [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, 1e30], special.sum()
        )
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(dtype)


def train(params, dtype, options, *, wild=False, steps=3, threads=1, grad_dtype=None):
    """Steps an optimizer and the oracle side by side; the second gradient is missing once."""
    options = possible(options, dtype)
    flat = [np.array(p).reshape(-1) for p in params]
    oracle = StoredOracle(flat, lr=0.01, **options)
    opt = RMSprop(params, lr=0.01, threads=threads, **options)
    for step in range(steps):
        grads = [
            numbers((step, i), p.size, grad_dtype or dtype, wild)
            for i, p in enumerate(flat)
        ]
        grads = [None if (step, i) == (1, 1) else g for i, g in enumerate(grads)]
        oracle.step(grads)
        opt.step(
            grads=[
                None if g is None else g.reshape(p.shape) for p, g in zip(params, grads)
            ]
        )
    return opt, oracle


def assert_equal(opt, oracle):
    params = [np.array(p).reshape(-1) for p in opt.param_groups[0]["params"]]
    assert bits(params) == bits(oracle.params)
    for index, state in enumerate(oracle.state):
        found = {
            k: v if k == "step" else v.reshape(-1) for k, v in opt.state[index].items()
        }
        assert bits(found) == bits(
            dict(sorted(state.items(), key=lambda kv: list(found).index(kv[0])))
        )


@given(
    options=STORAGE,
    name=st.sampled_from(PARAMETERS),
    grad=st.sampled_from(["float16", "bfloat16", "float32"]),
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=2, max_size=3),
    seed=st.integers(0, 9),
    wild=st.booleans(),
)
@example(
    {"state_dtype": "uint8", "momentum": 0.9},
    "float32",
    "float32",
    [9000, 300],
    1,
    True,
)
@example(
    {"master_weight_bits": 24, "rounding": "stochastic"},
    "bfloat16",
    "bfloat16",
    [9000, 7],
    1,
    True,
)
@settings(max_examples=150, deadline=None)
def test_follows_the_oracle(options, name, grad, lengths, seed, wild):
    dtype = dtype_of(name)
    params = [numbers((seed, i), numel, dtype, wild) for i, numel in enumerate(lengths)]
    assert_equal(*train(params, dtype, options, wild=wild, grad_dtype=dtype_of(grad)))


EVERY = {
    "state_dtype": {
        "square_avg": "uint8",
        "momentum_buffer": "uint8",
        "ema": "bfloat16",
    },
    "rounding": "stochastic",
    "momentum": 0.9,
    "ema_decay": 0.9,
    "seed": 5,
}
FORMS = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("float32", EVERY),
        ("float16", EVERY),
        ("bfloat16", EVERY),
        ("bfloat16", {**EVERY, "master_weight_bits": 24}),
        ("bfloat16", {"master_weight_bits": 32, "centered": True}),
        ("bfloat16", {"state_dtype": "bfloat16", "centered": True}),
        ("float16", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "+".join(map(str, x)),
)


def layouts(array):
    """The same numbers of shape (90, 100), walked in other ways."""
    yield "C", np.ascontiguousarray(array)
    yield "Fortran", np.asfortranarray(array)
    wide = np.zeros((90, 200), array.dtype)
    wide[:, ::2] = array
    yield "strided", wide[:, ::2]
    yield "backwards", np.ascontiguousarray(array[::-1])[::-1]


@FORMS
@pytest.mark.parametrize("threads", [1, 2])
def test_layouts_and_threads(name, options, threads):
    dtype = dtype_of(name)
    first = numbers(1, 9000, dtype).reshape(90, 100)
    for _, p in layouts(first):
        assert_equal(
            *train([p, numbers(2, 300, dtype)], dtype, options, threads=threads)
        )


@FORMS
def test_many_elements_on_threads(name, options):
    """So many that threads take part, cut at blocks."""
    dtype = dtype_of(name)
    params = [numbers(i, n, dtype) for i, n in enumerate((300_001, 77, 260_000))]
    train_on = [
        train([p.copy() for p in params], dtype, options, threads=t)[0]
        for t in (1, 2, 3)
    ]
    states = [bits(opt.state_dict()["state"]) for opt in train_on]
    assert states[0] == states[1] == states[2]


@FORMS
def test_contiguous_params_change_nothing(name, options):
    dtype = dtype_of(name)
    arrays = [numbers(i, n, dtype) for i, n in enumerate((5000, 77, 4200))]
    params = [Parameter(a.copy()) for a in arrays]
    found = []
    for extra in ({}, {"contiguous_params": True}):
        params = [Parameter(a.copy()) for a in arrays]
        opt = RMSprop(params, lr=0.01, **possible(options, dtype), **extra)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = numbers((step, i), p.size, dtype)
            opt.step()
        found.append(bits([[p.data for p in params], opt.state_dict()["state"]]))
    assert found[0] == found[1]


@FORMS
def test_restarts_continue(name, options):
    """From a checkpoint, a pickle and a copy, in the middle, bit for bit."""
    dtype = dtype_of(name)
    options = possible(options, dtype)
    w = numbers(1, 9000, dtype)
    opt = RMSprop([w], lr=0.01, **options)
    for step in range(3):
        opt.step(grads=[numbers(step, 9000, dtype)])
    again = RMSprop([w.copy()], lr=0.01, **options)
    again.load_state_dict(opt.state_dict())
    copied = copy.deepcopy(opt)
    for step in range(3, 6):
        for one in (opt, again, copied):
            one.step(grads=[numbers(step, 9000, dtype)])
    found = [
        bits([o.param_groups[0]["params"][0], o.state_dict()["state"]])
        for o in (opt, again, copied)
    ]
    assert found[0] == found[1] == found[2]


@FORMS
@pytest.mark.parametrize("channels_last", [False, True])
def test_both_fronts(name, options, channels_last):
    dtype = dtype_of(name)
    options = {**possible(options, dtype), "lr": 0.01}
    array = numbers(1, 9600, dtype).reshape(4, 3, 20, 40)

    def tensor(x):
        raw = x.view(np.int16) if x.dtype.itemsize == 2 else x
        made = torch.from_numpy(raw.copy())
        made = made.view(getattr(torch, name)) if x.dtype.itemsize == 2 else made
        return (
            made.contiguous(memory_format=torch.channels_last)
            if channels_last
            else made
        )

    p = torch.nn.Parameter(tensor(array))
    theirs = TorchRMSprop([p], eps_in_sqrt=True, lr_in_momentum=True, **options)
    ours = RMSprop([array], **options)
    for step in range(3):
        g = numbers(step, 9600, dtype).reshape(array.shape)
        p.grad = tensor(g)
        theirs.step()
        ours.step(grads=[g])
    entry = {k: v for k, v in theirs.state[p].items() if k != "step"}
    as_bits = lambda x: (
        x.view(torch.int16) if x.dtype == torch.bfloat16 else x
    ).numpy()
    assert (as_bits(p.detach().contiguous()).view(dtype) == array).all()
    assert set(entry) | {"step"} == set(ours.state[0])
    for key, x in entry.items():
        mine = ours.state[0][key]
        assert as_bits(x.contiguous()).tobytes() == np.ascontiguousarray(mine).tobytes()
