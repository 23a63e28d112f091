"""What became of an array since the last step is seen at the next: what a check found holds while nothing moves."""

import numpy as np
import pytest
from problems import bits, gradients_for, random_arrays
from producers import Versioned
from rmsprop import Parameter, RMSprop

# NumPy would rather have new views; that arrays can be changed in place is what this is about.
pytestmark = pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")


@pytest.fixture
def memory():
    return np.ones(32, np.float32)


@pytest.fixture
def param(memory):
    """Every second of half of it."""
    return memory[:16:2]


GRAD = np.ones(8, np.float32)


def test_strides_that_make_it_overlap_itself(memory, param):
    """Refused at every step, not only the first, until they are as they were."""
    opt = RMSprop([param])
    opt.step(grads=[GRAD])
    before = bits([memory, opt.state_dict()])
    for strides in (0, 0, 0, 2):
        param.strides = strides
        with pytest.raises(ValueError, match=r"parameter 0.*(overlap|align)"):
            opt.step(grads=[GRAD])
        assert bits([memory, opt.state_dict()]) == before
    param.strides = 8
    opt.step(grads=[GRAD])
    assert opt.state[0]["step"] == 2


def test_what_changed_without_a_gradient_is_checked_when_one_comes(memory, param):
    opt = RMSprop([param, np.ones(3, np.float32)])
    opt.step(grads=[GRAD, np.ones(3, np.float32)])
    for spoil, mend in [
        (lambda: setattr(param, "strides", 0), lambda: setattr(param, "strides", 8)),
        (lambda: param.setflags(write=False), lambda: param.setflags(write=True)),
    ]:
        spoil()
        opt.step(grads=[None, np.ones(3, np.float32)])
        before = bits([memory, opt.state_dict()])
        for _ in range(2):
            with pytest.raises(ValueError, match=r"parameter 0.*(overlap|read-only)"):
                opt.step(grads=[GRAD, np.ones(3, np.float32)])
            assert bits([memory, opt.state_dict()]) == before
        mend()
        opt.step(grads=[GRAD, np.ones(3, np.float32)])


def test_strides_that_make_it_overlap_another(memory, param):
    opt = RMSprop([memory[1:16:2], param])
    opt.step(grads=[GRAD, GRAD])
    before = bits([memory, opt.state_dict()])
    for _ in range(3):
        param.strides = 12
        with pytest.raises(ValueError, match="parameter 1 overlaps parameter 0"):
            opt.step(grads=[GRAD, GRAD])
        assert bits([memory, opt.state_dict()]) == before


@pytest.mark.parametrize("strides", [4, 12])
def test_strides_are_followed(strides, memory, param):
    opt = RMSprop([param])
    opt.step(grads=[GRAD])
    memory[...] = 1
    param.strides = strides
    opt.step(grads=[GRAD])
    changed = np.flatnonzero(memory != 1)
    assert changed.tolist() == [index * strides // 4 for index in range(8)]


def retype_at_the_same_address(array):
    """To an integer type whose description lies where the old one's did, if that is free."""
    before = id(array.dtype)
    for tries in range(1000):
        array.dtype = np.dtype("u4")
        array.dtype = np.dtype("i4", metadata={"try": tries})
        if id(array.dtype) == before:
            return


def with_metadata(array):
    """A type with a description of its own, which goes when the array gets another."""
    array.dtype = np.dtype("f4", metadata={"try": -1})
    return array


@pytest.mark.parametrize("culprit", ["parameter", "gradient"])
def test_types_that_change_in_place(culprit):
    """Though the description of the new type may lie where the old one's lay."""
    param, grad = (with_metadata(np.ones(4, np.float32)) for _ in range(2))
    opt = RMSprop([param])
    opt.step(grads=[grad])
    retype_at_the_same_address({"parameter": param, "gradient": grad}[culprit])
    before = bits([param, grad, opt.state_dict()["state"]])
    for _ in range(3):
        with pytest.raises(TypeError, match=f"{culprit} 0.*float32.*got int32"):
            opt.step(grads=[grad])
        assert bits([param, grad, opt.state_dict()["state"]]) == before


def test_old_memory_is_nobodys(contiguous):
    """Data replaced at every step, with gradients wherever the allocator puts them, never seem to overlap."""
    params = [Parameter(array) for array in random_arrays(0, [(64,)] * 2)]
    opt = RMSprop(params, contiguous_params=contiguous)
    for seed in range(200):
        moved = params[seed % 2]
        moved.data = moved.data.copy()
        opt.step(grads=gradients_for(params, seed))
    assert [opt.state[index]["step"] for index in range(2)] == [200, 200]


def capsules(array):
    param = Versioned(array)
    return param, lambda new: setattr(param, "array", new)


def parameters(array):
    param = Parameter(array)
    return param, lambda new: setattr(param, "data", new)


@pytest.mark.parametrize("make", [capsules, parameters])
def test_a_parameter_that_moves_without_a_gradient(make):
    """Its old memory may be another's gradient, its new one may not."""
    old, new = random_arrays(0, [(8,)] * 2)
    moving, move = make(old)
    param = np.ones(8, np.float32)
    opt = RMSprop([moving, param])
    opt.step(grads=[None, GRAD])
    move(new)
    opt.step(grads=[None, old])
    with pytest.raises(ValueError, match="gradient 1 overlaps parameter 0"):
        opt.step(grads=[GRAD, new])
    assert [opt.state[index]["step"] for index in range(2)] == [0, 2]
