"""Clipping by `clip_grad`: per group, any norm, in place, as torch's `clip_grad_norm_`."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import SHAPES, bits, random_arrays, random_parameters, snapshot
from rmsprop import Parameter, RMSprop

NORM_TYPES = (1, 2, 3.5, 0, math.inf, -math.inf)
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def clipping(params, max_norm, norm_type):
    return {
        "params": params,
        "clip_grad_max_norm": max_norm,
        "clip_grad_norm_type": norm_type,
    }


def build(arrays, max_norm, norm_type, contiguous):
    params = [Parameter(np.zeros_like(array)) for array in arrays]
    for param, array in zip(params, arrays, strict=True):
        param.grad = array.copy()
    opt = RMSprop([clipping(params, max_norm, norm_type)], contiguous_params=contiguous)
    return params, opt


def clipped_by_torch(arrays, max_norm, norm_type):
    tensors = [
        torch.zeros(array.shape, dtype=torch.tensor(array).dtype) for array in arrays
    ]
    for tensor, array in zip(tensors, arrays, strict=True):
        tensor.grad = torch.tensor(array)
    norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm, norm_type)
    return [tensor.grad.numpy() for tensor in tensors], norm.item()


def assert_clips_as_torch(arrays, max_norm, norm_type, contiguous):
    params, opt = build(arrays, max_norm, norm_type, contiguous)
    (norm,) = opt.clip_grad()
    expected, expected_norm = clipped_by_torch(arrays, max_norm, norm_type)
    rtol = TOLERANCE[arrays[0].dtype.name]
    np.testing.assert_allclose(norm, expected_norm, rtol=rtol)
    for param, wanted in zip(params, expected, strict=True):
        np.testing.assert_allclose(param.grad, wanted, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("max_norm", [0, 0.5, 1000.0])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_clips_as_torch(norm_type, max_norm, dtype, contiguous):
    assert_clips_as_torch(
        random_arrays(3, dtype=dtype), max_norm, norm_type, contiguous
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_nonfinite_gradients_spread_as_in_torch(norm_type, value, contiguous):
    arrays = random_arrays(3)
    arrays[1][4] = value
    assert_clips_as_torch(arrays, 1.0, norm_type, contiguous)


@given(
    norm_type=st.sampled_from(NORM_TYPES) | st.floats(0.5, 8),
    max_norm=st.floats(0, 100),
    values=st.lists(
        st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-4)
    ),
)
def test_any_norm_of_any_gradient(norm_type, max_norm, values):
    arrays = [np.array(values, "float64"), np.ones((2, 2))]
    if math.isinf(norm_type) and not values:
        arrays.pop(0)  # torch refuses the extreme of nothing
    assert_clips_as_torch(arrays, max_norm, norm_type, contiguous=False)


def test_zero_gradients(contiguous):
    """Of size zero, and all zero; the norm given as a string, as OneFlow takes it."""
    arrays = [np.zeros((0, 3), "float32"), np.zeros(4, "float32")]
    assert_clips_as_torch(arrays, 1.0, 2.0, contiguous)
    _, opt = build(random_arrays(3), 1.0, "inf", contiguous)
    _, expected = clipped_by_torch(random_arrays(3), 1.0, math.inf)
    assert opt.clip_grad() == pytest.approx([expected], rel=1e-6)


def test_each_group_has_its_own_norm(contiguous):
    """A group without the keys, or with one of them, is left alone; so is a gradient that is None."""
    arrays = random_arrays(3, [(4,)] * 6)
    params = [Parameter(np.zeros(4, "float32")) for _ in arrays]
    for param, array in zip(params, arrays, strict=True):
        param.grad = array.copy()
    params[5].grad = None
    groups = [
        clipping(params[:2], 0.5, 2),
        {"params": params[2:3]},
        {"params": params[3:4], "clip_grad_max_norm": 0.1},
        clipping(params[4:], 0.25, math.inf),
    ]
    norms = RMSprop(groups, contiguous_params=contiguous).clip_grad()
    first, first_norm = clipped_by_torch(arrays[:2], 0.5, 2)
    last, last_norm = clipped_by_torch(arrays[4:5], 0.25, math.inf)
    for param, wanted in zip(params, [*first, *arrays[2:4], *last]):
        np.testing.assert_allclose(param.grad, wanted, rtol=1e-5)
    assert params[5].grad is None
    assert [norm for norm in norms if norm is not None] == pytest.approx(
        [first_norm, last_norm], rel=1e-5
    )


def test_scales_in_place(contiguous):
    params, opt = build(random_arrays(3), 0.5, 2, contiguous)
    held = [param.grad for param in params]
    opt.clip_grad()
    assert all(
        np.shares_memory(param.grad, grad)
        for param, grad in zip(params, held, strict=True)
    )


def test_tensors_are_clipped_too():
    tensors = [torch.zeros(shape) for shape in SHAPES]
    for tensor, array in zip(tensors, random_arrays(3), strict=True):
        tensor.grad = torch.tensor(array)
    RMSprop([clipping(tensors, 0.5, 2)]).clip_grad()
    for tensor, wanted in zip(
        tensors, clipped_by_torch(random_arrays(3), 0.5, 2)[0], strict=True
    ):
        np.testing.assert_allclose(tensor.grad, wanted, rtol=1e-5)


def test_parameters_without_grad_are_left_out():
    assert RMSprop([clipping(random_arrays(0), 1.0, 2)]).clip_grad() == [0.0]


@pytest.mark.parametrize("norm_type", [1, 2, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_error_if_nonfinite(value, norm_type, contiguous):
    """Nothing is scaled, not in the groups before either."""
    good, bad = random_parameters(0), random_parameters(5)
    bad[1].grad[4] = value
    groups = [clipping(good, 0.1, norm_type), clipping(bad, 0.1, norm_type)]
    opt = RMSprop(groups, contiguous_params=contiguous)
    before = bits([param.grad for param in (*good, *bad)]), snapshot(opt)
    with pytest.raises(RuntimeError, match="group 1"):
        opt.clip_grad(error_if_nonfinite=True)
    assert (bits([param.grad for param in (*good, *bad)]), snapshot(opt)) == before
    bad[1].grad[4] = 0
    assert len(opt.clip_grad(error_if_nonfinite=True)) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip_grad_max_norm", -1.0),
        ("clip_grad_max_norm", math.nan),
        ("clip_grad_norm_type", math.nan),
        ("clip_grad_norm_type", "two"),
    ],
)
def test_bad_keys(key, value):
    params, opt = build(random_arrays(3), 1.0, 2.0, contiguous=False)
    before = bits([param.grad for param in params])
    with pytest.raises((ValueError, TypeError), match=f"{key}.*group 0"):
        opt.param_groups[0][key] = value
        opt.clip_grad()
    assert bits([param.grad for param in params]) == before
