"""`max_grad_norm` clips by the norm over all groups inside the step, without writing gradients."""

import math
from itertools import chain

import numpy as np
import pytest
from problems import bits, gradients_for, random_arrays, random_parameters, snapshot
from rmsprop import RMSprop

OPTIONS = {"momentum": 0.9, "centered": True}


def build(contiguous, **options):
    params = random_parameters(0)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]
    return params, RMSprop(groups, **OPTIONS, **options, contiguous_params=contiguous)


def exact_norm(grads):
    return math.sqrt(
        math.fsum(float(x) ** 2 for x in chain(*(grad.ravel() for grad in grads)))
    )


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("max_grad_norm", [0.5, 1000.0, math.inf])
def test_equals_gradients_scaled_before(max_grad_norm, maximize, contiguous):
    """The factor is rounded once to the parameter's type; the gradients stay as they are."""
    params, opt = build(contiguous, max_grad_norm=max_grad_norm, maximize=maximize)
    expected, plain = build(contiguous, maximize=maximize)
    for seed in range(3):
        grads = gradients_for(params, seed)
        before = bits(grads)
        opt.step(grads=grads)
        assert bits(grads) == before
        assert opt.last_grad_norm == pytest.approx(exact_norm(grads), rel=1e-14)
        factor = np.float32(min(1.0, max_grad_norm / (opt.last_grad_norm + 1e-6)))
        plain.step(grads=[factor * grad for grad in grads])
    assert bits(params) == bits(expected)
    assert bits(opt.state_dict()["state"]) == bits(plain.state_dict()["state"])


def strided(array):
    return np.repeat(array, 2, axis=-1)[..., ::2]


def test_norm_does_not_depend_on_threads():
    """Nor on how the gradients lie in memory: the squares are summed in fixed chunks."""
    shapes = [(1000, 700), (3,), (800_001,)]
    reached = set()
    for threads in (1, 2, 3):
        for arrange in (np.ascontiguousarray, np.asfortranarray, strided):
            params, grads = random_arrays(0, shapes), random_arrays(1, shapes)
            opt = RMSprop(params, max_grad_norm=1.0, threads=threads)
            opt.step(grads=[arrange(grad) for grad in grads])
            reached.add((opt.last_grad_norm, *(param.tobytes() for param in params)))
    assert len(reached) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_squares_do_not_overflow_float32(dtype):
    param, grad = np.zeros(4, dtype), np.full(4, 1e30, dtype)
    opt = RMSprop([param], max_grad_norm=1.0)
    opt.step(grads=[grad])
    assert opt.last_grad_norm == pytest.approx(2e30)
    assert np.isfinite(param).all()
    assert (param < 0).all()


def test_parameters_of_both_types_have_one_norm():
    params = [np.zeros(3, "float32"), np.zeros(4, "float64")]
    opt = RMSprop(params, max_grad_norm=1.0)
    opt.step(grads=[np.full(3, 2, "float32"), np.full(4, 3, "float64")])
    assert opt.last_grad_norm == pytest.approx(math.sqrt(3 * 4 + 4 * 9))


def test_gradients_that_are_none_do_not_count(contiguous):
    params, opt = build(contiguous, max_grad_norm=1.0)
    grads = [None, *gradients_for(params, 1)[1:]]
    opt.step(grads=grads)
    assert opt.last_grad_norm == pytest.approx(exact_norm(grads[1:]))
    opt.step(grads=[None] * 4)
    assert opt.last_grad_norm == 0


def test_last_grad_norm_is_none_unless_it_clips(contiguous):
    _, opt = build(contiguous)
    opt.step()
    assert opt.last_grad_norm is None
    opt.max_grad_norm = 1.0
    assert opt.last_grad_norm is None
    opt.step()
    assert opt.last_grad_norm > 0


def test_infinite_gradient_leaves_the_others_at_zero(contiguous):
    """As torch's clipping does: the factor is 0, and 0 * inf is NaN."""
    params, opt = build(contiguous, max_grad_norm=1.0)
    before = bits(params[3])
    grads = gradients_for(params, 1)
    grads[1][4] = math.inf
    opt.step(grads=grads)
    assert opt.last_grad_norm == math.inf
    assert np.flatnonzero(np.isnan(params[1].data)).tolist() == [4]
    assert bits(params[3]) == before


def test_nan_gradient_spreads_everywhere(contiguous):
    """As torch's clipping does: the norm, hence the factor, is NaN."""
    params, opt = build(contiguous, max_grad_norm=1.0)
    grads = gradients_for(params, 1)
    grads[1][4] = math.nan
    opt.step(grads=grads)
    assert math.isnan(opt.last_grad_norm)
    assert all(np.isnan(param.data).all() for param in params)


def test_failed_step_changes_nothing(contiguous):
    params, opt = build(contiguous, max_grad_norm=1.0)
    opt.step()
    before = snapshot(opt), opt.last_grad_norm
    with pytest.raises(ValueError):
        opt.step(grads=[*gradients_for(params, 1)[:3], np.zeros(1, "float32")])
    assert (snapshot(opt), opt.last_grad_norm) == before
