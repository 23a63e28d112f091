"""`step(closure)` computes the loss first and gives it back; a closure that fails changes nothing."""

import numpy as np
import pytest
from problems import bits, gradients_for, random_parameters, set_gradients, snapshot
from rmsprop import RMSprop


@pytest.fixture
def params():
    return random_parameters(0)


@pytest.fixture
def opt(params, contiguous):
    return RMSprop(params, momentum=0.9, contiguous_params=contiguous)


@pytest.mark.parametrize(
    "call",
    [
        lambda opt, closure: opt.step(closure),
        lambda opt, closure: opt.step(closure=closure),
    ],
    ids=["positional", "keyword"],
)
def test_closure_runs_once_before_gradients_are_read(opt, params, call):
    expected = random_parameters(0)
    set_gradients(expected, seed=5)
    RMSprop(expected, momentum=0.9).step()
    losses = []

    def closure():
        set_gradients(params, seed=5)
        losses.append(object())
        return losses[-1]

    returned = call(opt, closure)
    assert [returned] == losses
    assert bits(params) == bits(expected)


def test_without_closure_returns_none(opt):
    assert opt.step() is None


def test_closure_goes_with_grads(opt, params):
    expected = random_parameters(0)
    grads = gradients_for(params, 7)
    RMSprop(expected, momentum=0.9).step(grads=grads)
    assert opt.step(lambda: 1.5, grads=grads) == 1.5
    assert bits(params) == bits(expected)


def test_closure_that_raises(opt):
    opt.step()
    before = snapshot(opt)
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert snapshot(opt) == before


def test_closure_may_write_parameters(opt, params):
    """The step starts from what the closure left, as a line search does."""

    def closure():
        for param in params:
            param.data[...] = 0

    before = [np.array(param.grad) for param in params]
    opt.step(closure)
    for param, grad in zip(params, before, strict=True):
        assert (np.sign(param.data) == -np.sign(grad)).all()


def test_not_callable(opt):
    before = snapshot(opt)
    with pytest.raises(TypeError):
        opt.step(3)
    assert snapshot(opt) == before
