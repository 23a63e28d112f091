"""What a NumPy array has and can be turned into, its `Parameter` has and can too."""

import numpy as np
import pytest
from problems import bits, random_arrays
from rmsprop import Parameter


@pytest.fixture
def array():
    return random_arrays(0, [(2, 3)])[0]


USES = {
    "T": lambda x: x.T,
    "nbytes": lambda x: x.nbytes,
    "sum": lambda x: x.sum(axis=0),
    "mean": lambda x: x.mean(),
    "reshape": lambda x: x.reshape(3, 2),
    "astype": lambda x: x.astype("float64"),
    "tolist": lambda x: x.tolist(),
    "copy": lambda x: x.copy(),
    "len": len,
    "iteration": list,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_attributes_and_methods(use, array):
    result = use(Parameter(array))
    assert not isinstance(result, Parameter)
    assert bits(result) == bits(use(array))


def test_views_are_of_its_memory(array):
    param = Parameter(array)
    param.T[2, 1] = 42
    param.reshape(-1)[0] = 7
    assert (array[1, 2], array[0, 0]) == (42, 7)


@pytest.mark.parametrize("value", [0.0, -0.0, 2.5, np.nan])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_truth_of_one_element(value, shape):
    array = np.full(shape, value, np.float32)
    assert bool(Parameter(array)) is bool(array)


@pytest.mark.parametrize("shape", [(0,), (2,), (2, 3)])
def test_truth_of_any_other_number(shape):
    """An error, as with arrays, so that `if param:` does not pass for `if param is not None:`."""
    with pytest.raises(ValueError, match="truth value"):
        bool(Parameter(np.ones(shape, np.float32)))


def test_float():
    assert float(Parameter(np.array(2.5, np.float32))) == 2.5
    with pytest.raises(TypeError):
        float(Parameter(np.ones(2, np.float32)))


def test_attributes_that_arrays_lack(array):
    param = Parameter(array)
    with pytest.raises(AttributeError):
        param.requires_grad  # noqa: B018
    assert not hasattr(param, "__array_interface__")


def test_protocols():
    matrix, scalar = Parameter(np.eye(2)), Parameter(np.array(2.5))
    assert [row.tolist() for row in matrix] == [[1, 0], [0, 1]]
    assert 1.0 in matrix
    assert 3.0 not in matrix
    assert (int(scalar), round(scalar), f"{scalar:.2f}") == (2, 2, "2.50")
    with pytest.raises(TypeError):
        list(scalar)


def test_several_outputs_stay_parameters():
    fraction, whole = Parameter(np.zeros(2)), Parameter(np.zeros(2))
    result = np.modf(np.array([1.5, 2.25]), out=(fraction, whole))
    assert result[0] is fraction
    assert result[1] is whole
    assert (fraction.data.tolist(), whole.data.tolist()) == ([0.5, 0.25], [1, 2])


def test_name_is_text():
    with pytest.raises(TypeError, match=r"name of a Parameter: expected a str.*got 3"):
        Parameter(np.ones(2), name=3)
