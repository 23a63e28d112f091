"""The same bits as the rule written in NumPy, whatever the options, type, length, layout, input kind and threads.

Instruction sets are in test_isa.py, kinds of gradients in test_gradients.py.
"""

import array as stdlib
import mmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from problems import bits, random_arrays, wild_array
from producers import Handmade, Versioned
from rmsprop import Parameter, RMSprop

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
BUSY = {"momentum": 0.9, "centered": True, "weight_decay": 0.01}


def assert_follows_oracle(
    params,
    steps_of_grads,
    threads=1,
    read=np.asarray,
    contiguous_params=False,
    **options,
):
    """Trains the parameters and the oracle's copies of them side by side."""
    oracle = Oracle([np.array(read(param)) for param in params], **options)
    opt = RMSprop(
        params, threads=threads, contiguous_params=contiguous_params, **options
    )
    for grads in steps_of_grads:
        opt.step(grads=grads)
        oracle.step(grads)
    assert bits([read(param) for param in params]) == bits(oracle.params)
    assert bits(opt.state_dict()["state"]) == bits(oracle.state)


def positive(limit):
    """What a caller would choose, and what only a fuzzer would."""
    return st.sampled_from([0.0, 1e-300, 1e-45]) | st.floats(0, limit)


def possible(options):
    """Without what needs decoupled decay, where that is off."""
    needs = ("cautious_weight_decay", "corrected_weight_decay")
    is_on = options.get("decoupled_weight_decay")
    return {k: v for k, v in options.items() if is_on or k not in needs}


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "lr": positive(1e40),
        "alpha": st.sampled_from([0.0, 0.9, 0.99]) | st.floats(0, 1, exclude_max=True),
        "eps": positive(10),
        "weight_decay": positive(10),
        "momentum": positive(10),
        "initial_square_avg": positive(10),
        "centered": st.booleans(),
        "eps_in_sqrt": st.booleans(),
        "lr_in_momentum": st.booleans(),
        "nesterov": st.booleans(),
        "bias_correction": st.booleans(),
        "decoupled_weight_decay": st.booleans(),
        "cautious_weight_decay": st.booleans(),
        "corrected_weight_decay": st.booleans(),
        "clip_weights": st.sampled_from([None, 1e-45, 0.1]),
        "ema_decay": st.none() | st.floats(0, 1),
        "maximize": st.booleans(),
    },
).map(possible)


@given(
    options=OPTIONS,
    dtype=st.sampled_from(["float32", "float64"]),
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=3),
    steps=st.integers(1, 4),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=300)
def test_options_lengths_and_values(options, dtype, lengths, steps, threads, seed):
    def draw(step):
        return [
            wild_array((seed, step, index), length, dtype)
            for index, length in enumerate(lengths)
        ]

    assert_follows_oracle(
        draw(steps), [draw(step) for step in range(steps)], threads=threads, **options
    )


def test_alpha_of_1():
    """v and m stay where they are."""
    grads = [random_arrays(seed) for seed in (1, 2)]
    assert_follows_oracle(
        random_arrays(0), grads, alpha=1.0, centered=True, initial_square_avg=0.5
    )


def inside(shape, index, values):
    """A copy of the values that is a part of a larger array."""
    view = np.zeros(shape, values.dtype)[(*(index,) * values.ndim, ...)]
    view[...] = values
    return view


def spread(values):
    """Every other element along every axis."""
    return inside([2 * length for length in values.shape], slice(None, None, 2), values)


def in_the_middle(values):
    return inside([length + 2 for length in values.shape], slice(1, -1), values)


def backwards(values):
    return inside(values.shape, slice(None, None, -1), values)


def in_mmap(values):
    room = mmap.mmap(-1, max(1, values.nbytes))
    flat = memoryview(room)[: values.nbytes].cast(values.dtype.char)
    flat[:] = memoryview(values.ravel())
    return flat


KINDS = {
    "C order": lambda values: values,
    "Fortran order": np.asfortranarray,
    "transposed": lambda values: values.T,
    "axes moved": lambda values: np.moveaxis(values, -1, 0) if values.ndim else values,
    "spread": spread,
    "backwards": backwards,
    "in the middle": in_the_middle,
    "Parameter": Parameter,
    "contiguous Parameter": Parameter,
    "spread Parameter": lambda values: Parameter(spread(values)),
    "versioned capsule": Versioned,
    "spread versioned capsule": lambda values: Versioned(spread(values)),
    "capsule": Handmade,
    "capsule without strides": lambda values: Handmade(values, has_strides=False),
    "capsule with an offset": lambda values: Handmade(values, byte_offset=64),
    "tensor": torch.from_numpy,
    "transposed tensor": lambda values: torch.from_numpy(values.T),
    "spread tensor": lambda values: torch.from_numpy(spread(values)),
    "memoryview": memoryview,
    "memoryview of bytes": lambda values: memoryview(bytearray(values)).cast(
        values.dtype.char
    ),
    "array.array": lambda values: stdlib.array(
        values.dtype.char, values.ravel().tolist()
    ),
    "mmap": in_mmap,
}
SHAPES = [(), (0,), (33,), (1, 9), (5, 7), (3, 0, 2), (2, 3, 4), (2, 1, 3, 2)]


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_and_layouts(kind, dtype):
    """Every shape at once, so that dense and other parameters share a step."""

    def memory(param):
        return np.asarray(getattr(param, "array", param))

    params = [KINDS[kind](values) for values in random_arrays(0, SHAPES, dtype)]
    shapes = [memory(param).shape for param in params]
    grads = [random_arrays(seed, shapes, dtype) for seed in (1, 2)]
    is_contiguous = kind == "contiguous Parameter"
    assert_follows_oracle(
        params, grads, read=memory, contiguous_params=is_contiguous, **BUSY
    )


def shifted(values, offset):
    """A copy that starts so many elements into its memory."""
    memory = np.empty(offset + values.size, values.dtype)
    memory[offset:] = values
    return memory[offset:]


@DTYPES
@pytest.mark.parametrize("offset", range(17))
def test_misalignment(offset, dtype):
    """Every offset from a vector's width; the gradient's is another."""

    def draw(seed, offset):
        lengths = (0, 1, 7, 16, 33, 70)
        return [
            shifted(wild_array((seed, length), length, dtype), offset)
            for length in lengths
        ]

    grads = [draw(seed, (5 * offset + seed) % 17) for seed in (1, 2)]
    assert_follows_oracle(draw(0, offset), grads, **BUSY)


LARGE = {
    "one huge": [(3_000_000,)],
    "huge and small": [(17,), (1_400_000,), (), (0, 4), (900, 1_001)],
    "many": [(300,)] * 5_000,
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shapes", LARGE.values(), ids=LARGE)
def test_threads(shapes, threads):
    grads = [random_arrays(seed, shapes) for seed in (1, 2)]
    assert_follows_oracle(random_arrays(0, shapes), grads, threads=threads, **BUSY)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "arrange",
    [np.asfortranarray, spread, backwards, torch.from_numpy],
    ids=lambda f: f.__name__,
)
def test_threads_and_layouts(arrange, threads):
    shapes = [(1_000, 701), (700_001,)]
    params = [arrange(values) for values in random_arrays(0, shapes)]
    grads = random_arrays(1, shapes)
    assert_follows_oracle(
        params, [grads, [np.asfortranarray(grad) for grad in grads]], threads, **BUSY
    )


def test_both_types_in_one_optimizer():
    params = random_arrays(0, [(9,), (4,)]) + random_arrays(0, [(9,), (5,)], "float64")
    grads = random_arrays(1, [(9,), (4,)]) + random_arrays(1, [(9,), (5,)], "float64")
    assert_follows_oracle(params[::-1], [grads[::-1]], **BUSY)
