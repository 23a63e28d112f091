"""Shared elements decide what overlaps, not bounds: destinations and gradients may interleave."""

from itertools import chain, combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from producers import Versioned
from rmsprop import Parameter, RMSprop

NUMEL = 128
INDICES = np.arange(NUMEL)


@st.composite
def layouts(draw, shape=None):
    """Shape, strides and offset, in elements, of a view into NUMEL of them."""
    if shape is None:
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
    strides = [draw(st.integers(-7, 7)) for _ in shape]
    reach = [
        (numel - 1) * stride
        for numel, stride in zip(shape, strides, strict=True)
        if numel
    ]
    below, above = -sum(min(0, r) for r in reach), sum(max(0, r) for r in reach)
    # Few elements beyond what the view itself needs, so that overlaps are likely.
    offset = draw(st.integers(below, min(below + 24, NUMEL - 1 - above)))
    return tuple(shape), tuple(strides), offset


def view(memory, layout):
    shape, strides, offset = layout
    return as_strided(
        memory[offset:], shape, [stride * memory.itemsize for stride in strides]
    )


def elements(layout):
    return view(INDICES, layout).ravel().tolist()


def are_apart(first, second):
    return not set(first) & set(second)


@given(st.lists(layouts(), min_size=1, max_size=4))
def test_destinations(chosen):
    touched = [elements(layout) for layout in chosen]
    fits = all(len(set(one)) == len(one) for one in touched)
    fits = fits and all(
        are_apart(one, other) for one, other in combinations(touched, 2)
    )
    memory = np.ones(NUMEL, np.float32)
    params = [view(memory, layout) for layout in chosen]
    if not fits:
        with pytest.raises(ValueError, match="overlap|share"):
            RMSprop(params)
        return
    RMSprop(params, lr=0.5).step(grads=[np.ones_like(param) for param in params])
    changed = np.flatnonzero(memory != 1).tolist()
    assert changed == sorted(chain.from_iterable(touched))


@given(st.data(), layouts())
def test_gradients(data, destination):
    """A gradient may overlap itself and other gradients, but no destination."""
    assume(len(set(elements(destination))) == len(elements(destination)))
    gradient = data.draw(layouts(destination[0]))
    memory = np.ones(NUMEL, np.float32)
    param, grad = view(memory, destination), view(memory, gradient)
    opt = RMSprop([param])
    if are_apart(elements(destination), elements(gradient)):
        opt.step(grads=[grad])
    else:
        with pytest.raises(ValueError, match="gradient 0.*overlaps.*parameter 0"):
            opt.step(grads=[grad])
        assert (memory == 1).all()


def test_many_interleaved_destinations():
    """A thousand columns of one matrix: every pair's bounds overlap, no element is shared."""
    matrix = np.ones((16, 1000), np.float32)
    opt = RMSprop(list(matrix.T))
    opt.step(grads=list(np.ones_like(matrix).T))
    assert (matrix != 1).all()


@pytest.mark.parametrize("wrap", [Versioned, Parameter, memoryview, torch.from_numpy])
def test_kinds_of_destinations(wrap):
    """Whatever shows the memory, at construction already."""
    memory = np.ones(8, np.float32)
    with pytest.raises(ValueError, match="parameter 1 overlaps parameter 0"):
        RMSprop([wrap(memory[:5]), wrap(memory[4:])])
    RMSprop([wrap(memory[:4]), wrap(memory[4:])])


KINDS = [np.asarray, Versioned, Parameter, memoryview, torch.from_numpy]


@pytest.mark.parametrize("wrap_new", KINDS)
@pytest.mark.parametrize("wrap_old", KINDS)
def test_added_destinations(wrap_old, wrap_new):
    """Also after steps; the optimizer goes on without what was refused."""
    memory = np.ones(12, np.float32)
    opt = RMSprop([wrap_old(memory[:5])], lr=0.5)
    for _ in range(2):
        with pytest.raises(ValueError, match="parameter 1 overlaps parameter 0"):
            opt.add_param_group({"params": [wrap_new(memory[4:])]})
        opt.step(grads=[np.ones(5, np.float32)])
    assert opt.state[0]["step"] == 2
    assert (memory[5:] == 1).all()
    opt.add_param_group({"params": [wrap_new(memory[5:])]})
    opt.step(grads=[None, np.ones(7, np.float32)])
    assert (memory != 1).all()
