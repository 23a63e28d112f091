"""A gradient of another real floating type is rounded once, to the type that a step computes in, as it is read."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from problems import bits, wild_array
from producers import Handmade, Legacy, Versioned, misaligned
from rmsprop import Parameter, RMSprop

FLOATS = ("float16", "float32", "float64")
SHAPES = st.sampled_from([(), (1,), (7,), (5, 6), (2, 3, 4), (0, 3), (1500,), (40, 33)])


def backwards(array):
    reverse = (..., *[slice(None, None, -1)] * array.ndim)
    return array[reverse].copy()[reverse]


def spread(array):
    room = np.zeros([2 * length for length in array.shape], array.dtype)
    view = room[(..., *[slice(None, None, 2)] * array.ndim)]
    view[...] = array
    return view


def fortran(array):
    return np.array(array, order="F")


def transposed(array):
    return array.T.copy().T


def unaligned(array):
    return misaligned(array, 1)


def broadcast(array):
    """One number for all of them."""
    if not array.size:
        return array
    return np.broadcast_to(array.ravel()[:1].reshape(()), array.shape)


def rows_broadcast(array):
    return np.broadcast_to(array[:1], array.shape) if array.ndim else array


def readonly(array):
    array = array.copy()
    array.flags.writeable = False
    return array


LAYOUTS = {
    function.__name__: function
    for function in (
        np.copy,
        backwards,
        spread,
        fortran,
        transposed,
        unaligned,
        broadcast,
        rows_broadcast,
        readonly,
    )
}


def as_tensor(array):
    """torch has no negative strides, and warns of what cannot be written."""
    if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array)


KINDS = {
    "ndarray": lambda array: array,
    "Parameter": Parameter,
    "buffer": memoryview,
    "capsule": Versioned,
    "legacy capsule": Legacy,
    "handmade capsule": Handmade,
    "tensor": as_tensor,
    "torch Parameter": lambda array: torch.nn.Parameter(as_tensor(array)),
}


def fits(kind, array):
    """What these can show at all."""
    strides = [stride % array.itemsize for stride in array.strides]
    is_whole = not any(strides) and array.ctypes.data % array.itemsize == 0
    if kind in ("tensor", "torch Parameter"):
        return is_whole
    if kind in ("capsule", "legacy capsule"):
        return is_whole and array.flags.writeable
    if kind == "handmade capsule":
        return array.flags.writeable and not any(strides)
    if kind == "Parameter":
        return array.dtype != np.float16
    return kind != "buffer" or array.flags.c_contiguous


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "momentum": st.just(0.9),
        "centered": st.booleans(),
        "weight_decay": st.just(0.01),
        "maximize": st.booleans(),
        "bias_correction": st.booleans(),
        "threads": st.integers(1, 3),
    },
)


def numbers(seed, shape, dtype):
    """Also those that another type rounds, overflows or has not got, and ties of both roundings."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        drawn = np.array(wild_array(seed, shape, "float64"))
        some = np.array(rng.random(shape) < 0.3)
        # Halfway between two numbers of float32, and a little beside it.
        ties = 1 + 2.0**-24 + rng.choice([-(2.0**-50), 0, 2.0**-50], shape)
        drawn[some] = np.array(ties)[some]
        return drawn.astype(dtype)


@given(
    shape=SHAPES,
    dtype=st.sampled_from(["float32", "float64"]),
    grad_dtypes=st.lists(st.sampled_from(FLOATS), min_size=1, max_size=3),
    layout=st.sampled_from(sorted(LAYOUTS)),
    param_layout=st.sampled_from(["copy", "fortran", "spread"]),
    kind=st.sampled_from(sorted(KINDS)),
    options=OPTIONS,
    seed=st.integers(0, 1000),
)
@settings(max_examples=300)
def test_as_if_numpy_had_rounded_it(
    shape, dtype, grad_dtypes, layout, param_layout, kind, options, seed
):
    """The type may be another at every step; the gradient is only read."""
    start = wild_array(seed, shape, dtype)
    param, other = LAYOUTS[param_layout](start), np.ones(3, dtype)
    opt = RMSprop([param, other], **options)
    options.pop("threads", None)
    oracle = Oracle([start.copy(), np.ones(3, dtype)], **options)
    for step, grad_dtype in enumerate(grad_dtypes):
        grad = LAYOUTS[layout](numbers((seed, step), shape, grad_dtype))
        made = KINDS[kind](grad) if fits(kind, grad) else grad
        before = grad.tobytes()
        opt.step(grads=[made, np.ones(3, grad_dtype)])
        assert grad.tobytes() == before
        with np.errstate(over="ignore", invalid="ignore"):
            oracle.step([grad.astype(dtype), np.ones(3, dtype)])
    assert bits([param, other]) == bits(oracle.params)
    assert bits(opt.state_dict()["state"]) == bits(oracle.state)


PAIRS = pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (dtype, grad_dtype)
        for dtype in ("float32", "float64")
        for grad_dtype in FLOATS
        if dtype != grad_dtype
    ],
)


@PAIRS
def test_gradients_in_grad(dtype, grad_dtype, contiguous):
    """As the attribute of a parameter, which may be in a flat buffer."""
    params = [Parameter(np.ones(shape, dtype)) for shape in ((3, 4), (5,))]
    opt = RMSprop(params, momentum=0.9, contiguous_params=contiguous)
    oracle = Oracle([np.ones(shape, dtype) for shape in ((3, 4), (5,))], momentum=0.9)
    for step in range(3):
        grads = [
            numbers((step, k), param.shape, grad_dtype if step else dtype)
            for k, param in enumerate(params)
        ]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        opt.step()
        with np.errstate(over="ignore"):
            oracle.step([grad.astype(dtype) for grad in grads])
    assert bits(params) == bits(oracle.params)


@pytest.mark.parametrize("grad_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_half_precision_tensors(dtype, grad_dtype):
    """Widening is exact."""
    param, same = np.ones((6, 7), dtype), np.ones((6, 7), dtype)
    opt, expected = RMSprop([param]), RMSprop([same])
    for seed in range(3):
        grad = torch.from_numpy(numbers(seed, (6, 7), "float32")).to(grad_dtype)
        opt.step(grads=[grad.t().contiguous().t() if seed else grad])
        expected.step(grads=[grad.to(getattr(torch, dtype))])
    assert bits(param) == bits(same)


@PAIRS
def test_the_norm_is_that_of_the_rounded_gradient(dtype, grad_dtype):
    params = [np.ones(2000, dtype), np.ones((3, 4), dtype)]
    same = [param.copy() for param in params]
    made = [RMSprop(some, max_grad_norm=0.5) for some in (params, same)]
    for step in range(3):
        rng = np.random.default_rng(step)
        grads = [rng.standard_normal(param.shape) for param in params]
        grads = [grad.astype(grad_dtype) for grad in grads]
        made[0].step(grads=grads)
        made[1].step(grads=[grad.astype(dtype) for grad in grads])
        assert made[0].last_grad_norm == made[1].last_grad_norm
    assert bits(params) == bits(same)


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
def test_what_is_finite_only_before_it_is_rounded(nonfinite):
    """It is infinite for the step, and said so."""
    param = np.ones(600, np.float32)
    grad = np.ones(600)
    grad[555] = 1e39
    opt = RMSprop([param], nonfinite=nonfinite)
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r"gradient 0.*inf.*555"):
            opt.step(grads=[grad])
    else:
        opt.step(grads=[grad])
    assert opt.skipped_steps == (nonfinite == "skip")
    assert (param == 1).all() == (nonfinite != "propagate")
    assert opt.state[0]["step"] == (nonfinite == "propagate")


NO_FLOATS = {
    "integers": lambda grad: grad.astype("int32"),
    "unsigned": lambda grad: grad.astype("uint8"),
    "booleans": lambda grad: grad.astype("bool"),
    "complex": lambda grad: grad.astype("complex64"),
    "complex128": lambda grad: grad.astype("complex128"),
    "long double": lambda grad: grad.astype("longdouble"),
    "objects": lambda grad: grad.astype("object"),
    "byte-swapped": lambda grad: grad.astype(">f4"),
    "byte-swapped float64": lambda grad: grad.astype(">f8"),
    "torch integers": lambda grad: torch.from_numpy(grad).int(),
    "torch complex": lambda grad: torch.from_numpy(grad).to(torch.complex64),
    "masked": lambda grad: np.ma.array(grad.astype("float64")),
}


@pytest.mark.parametrize("make", NO_FLOATS.values(), ids=NO_FLOATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_other_type(make, dtype):
    params = {name: np.ones((2, 3), dtype) for name in ("a", "b")}
    opt = RMSprop(params)
    grads = {"a": np.ones((2, 3), dtype), "b": make(np.ones((2, 3), np.float32))}
    with pytest.raises(TypeError, match=r"gradient 1 \('b'\)"):
        opt.step(grads=grads)
    assert all((param == 1).all() for param in params.values())
    assert opt.state[0]["step"] == opt.state[1]["step"] == 0


@PAIRS
def test_of_another_shape_too(dtype, grad_dtype):
    opt = RMSprop([np.ones((2, 3), dtype)])
    wanted = rf"gradient 0.*{dtype}.*\(2, 3\).*got {grad_dtype} of shape \(3, 2\)"
    with pytest.raises(ValueError, match=wanted):
        opt.step(grads=[np.ones((3, 2), grad_dtype)])


@PAIRS
def test_in_the_memory_of_a_parameter(dtype, grad_dtype):
    """Bytes decide what overlaps, whatever their types."""
    memory = np.ones(24, dtype)
    opt = RMSprop([memory[:8]])
    inside, beside = (
        some.view(np.uint8)[: 8 * np.dtype(grad_dtype).itemsize].view(grad_dtype)
        for some in (memory, memory[8:])
    )
    with pytest.raises(ValueError, match=r"gradient 0.*overlaps.*parameter 0"):
        opt.step(grads=[inside])
    assert (memory == 1).all()
    opt.step(grads=[beside])
    assert opt.state[0]["step"] == 1
