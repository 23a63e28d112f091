"""`nonfinite`: propagate as every peer does, skip the step, or raise; the last two change nothing at all."""

import math

import numpy as np
import pytest
from problems import NAMES, bits, gradients_for, random_arrays, snapshot
from rmsprop import Parameter, RMSprop

VALUES = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
CLIPPING = pytest.mark.parametrize("max_grad_norm", [None, 1.0])


def build(contiguous, **options):
    params = [
        Parameter(array, name)
        for array, name in zip(random_arrays(0), NAMES, strict=True)
    ]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    opt = RMSprop(groups, momentum=0.9, **options, contiguous_params=contiguous)
    opt.step(grads=gradients_for(params, 1))
    return params, opt


def bad_gradients(params, value):
    """One bad element, in the last parameter."""
    grads = gradients_for(params, 2)
    grads[3][1, 2, 3] = value
    return grads


@VALUES
@CLIPPING
def test_skip(value, max_grad_norm, contiguous):
    """Neither parameters nor state nor `step` change; `skipped_steps` counts, `last_grad_norm` tells."""
    params, opt = build(contiguous, nonfinite="skip", max_grad_norm=max_grad_norm)
    before = snapshot(opt)
    assert opt.skipped_steps == 0
    for count in (1, 2):
        assert opt.step(lambda: 0.25, grads=bad_gradients(params, value)) == 0.25
        assert opt.skipped_steps == count
        assert snapshot(opt) == before
    if max_grad_norm:
        assert not math.isfinite(opt.last_grad_norm)
    opt.step(grads=gradients_for(params, 3))
    assert opt.skipped_steps == 2
    assert [opt.state[index]["step"] for index in range(4)] == [2] * 4


@VALUES
@CLIPPING
def test_raise(value, max_grad_norm, contiguous):
    params, opt = build(contiguous, nonfinite="raise", max_grad_norm=max_grad_norm)
    before = snapshot(opt)
    with pytest.raises(FloatingPointError, match=r"gradient 3 \('fc.weight'\)"):
        opt.step(grads=bad_gradients(params, value))
    assert snapshot(opt) == before
    assert opt.skipped_steps == 0


@VALUES
def test_propagate_stays_in_its_element(value, contiguous):
    params, opt = build(contiguous)
    assert opt.nonfinite == "propagate"
    opt.step(grads=bad_gradients(params, value))
    assert not np.isfinite(params[3].data[1, 2, 3])
    params[3].data[1, 2, 3] = 0
    assert all(np.isfinite(param.data).all() for param in params)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@CLIPPING
def test_finite_gradients_of_any_size_pass(nonfinite, max_grad_norm):
    """Also those whose squares overflow."""
    params = [np.zeros(4, "float32"), np.zeros(4, "float64")]
    grads = [np.full(4, 3e38, "float32"), np.full(4, 1e300, "float64")]
    opt = RMSprop(params, nonfinite=nonfinite, max_grad_norm=max_grad_norm)
    opt.step(grads=grads)
    assert opt.skipped_steps == 0
    assert [opt.state[index]["step"] for index in range(2)] == [1, 1]


def test_gradients_that_are_none_are_not_looked_at(contiguous):
    params, opt = build(contiguous, nonfinite="skip")
    params[3].grad = bad_gradients(params, math.nan)[3]
    opt.step(grads=[*gradients_for(params, 2)[:3], None])
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_one_bad_element_among_millions(threads):
    param, grad = np.zeros(2_000_000, "float32"), np.ones(2_000_000, "float32")
    grad[1_999_999] = math.nan
    opt = RMSprop([param], nonfinite="skip", threads=threads)
    opt.step(grads=[grad])
    assert opt.skipped_steps == 1
    assert not param.any()


def test_can_be_changed_later(contiguous):
    params, opt = build(contiguous, nonfinite="raise")
    opt.nonfinite = "skip"
    before = bits(params)
    opt.step(grads=bad_gradients(params, math.nan))
    assert (bits(params), opt.skipped_steps) == (before, 1)
