"""A `Parameter` is a NumPy array with a gradient: NumPy code works on it unchanged."""

import copy
import operator
import pickle

import numpy as np
import pytest
import torch
from problems import bits, random_arrays
from rmsprop import Parameter, RMSprop


@pytest.fixture
def array():
    return random_arrays(0, [(3, 3)])[0]


def test_attributes(array):
    param = Parameter(array, "w")
    assert (param.name, Parameter(array).name) == ("w", None)
    assert param.grad is None
    assert isinstance(param.data, np.ndarray)
    assert (param.shape, param.dtype, param.ndim, param.size) == (
        (3, 3),
        np.float32,
        2,
        9,
    )
    assert bits(param.data) == bits(array)
    grad = np.ones_like(array)
    param.grad = grad
    assert param.grad is grad
    param.grad = None
    assert param.grad is None


@pytest.mark.parametrize("mask", [np.ma.nomask, [[0, 1, 0]] * 3], ids=["none", "some"])
def test_masked_arrays_are_refused(array, mask):
    """No step would heed the mask."""
    masked = np.ma.array(array, mask=mask)
    with pytest.raises(TypeError, match="mask"):
        Parameter(masked)
    param = Parameter(array)
    with pytest.raises(TypeError, match="mask"):
        param.data = masked
    assert param.data is array


@pytest.mark.parametrize(
    "view",
    [
        lambda param: param.data,
        np.asarray,
        np.from_dlpack,
        lambda param: torch.from_dlpack(param).numpy(),
        lambda param: np.array(param, copy=None),
    ],
    ids=["data", "asarray", "from_dlpack", "torch", "array"],
)
def test_views_share_memory(array, view):
    param = Parameter(array)
    view(param)[1, 2] = 42
    assert param.data[1, 2] == array[1, 2] == 42


def test_array_protocol_converts_and_copies(array):
    param = Parameter(array)
    assert np.asarray(param, dtype="float64").dtype == np.float64
    copied = np.array(param, copy=True)
    assert not np.shares_memory(copied, array)
    with pytest.raises(ValueError):
        np.asarray(param, dtype="float64", copy=False)


def test_data_can_be_replaced(array, contiguous):
    """The next step works on the new memory, and no longer on the old."""
    param = Parameter(array)
    opt = RMSprop([param], contiguous_params=contiguous)
    old, new = param.data, np.zeros((3, 3), np.float32)
    before = bits(old)
    param.data = new
    opt.step(grads=[np.ones((3, 3), np.float32)])
    assert bits(old) == before
    assert (param.data < 0).all()
    assert bits(np.asarray(param)) == bits(param.data)


def test_memory_of_replaced_data_is_free(array, contiguous):
    """It may be a gradient's, or another parameter's."""
    param = Parameter(array)
    opt = RMSprop([param], contiguous_params=contiguous)
    for use in (
        lambda old: opt.step(grads=[old]),
        lambda old: opt.add_param_group({"params": [Parameter(old)]}),
    ):
        old, param.data = param.data, np.zeros((3, 3), np.float32)
        use(old)


OPERATIONS = {
    "+": lambda x: x + 1,
    "reflected -": lambda x: 1 - x,
    "* array": lambda x: x * np.ones((3, 3), np.float32),
    "array *": lambda x: np.ones((3, 3), np.float32) * x,
    "itself": lambda x: x / x,
    "@": lambda x: x @ x,
    "array @": lambda x: np.ones((2, 3), np.float32) @ x,
    "**": lambda x: x**2,
    "neg": operator.neg,
    "abs": abs,
    ">": lambda x: x > 0,
    "ufunc": np.exp,
    "two-operand ufunc": lambda x: np.maximum(0, x),
    "reduction": np.add.reduce,
    "function": lambda x: np.linalg.norm(x),
    "index": lambda x: x[1, :2],
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operators(array, operation):
    result = operation(Parameter(array.copy()))
    assert isinstance(result, np.ndarray | np.generic)
    assert bits(result) == bits(operation(array))


@pytest.mark.parametrize(
    "operation", [operator.iadd, operator.isub, operator.imul, operator.itruediv]
)
def test_operators_in_place(array, operation):
    param = Parameter(array)
    expected = operation(array.copy(), 3)
    changed = operation(param, 3)
    assert changed is param
    assert bits(array) == bits(expected)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda param: pickle.loads(pickle.dumps(param))],
    ids=["deepcopy", "pickle"],
)
def test_copies(array, duplicate):
    param = Parameter(array, "w")
    param.grad = np.full((3, 3), 2, np.float32)
    copied = duplicate(param)
    assert type(copied) is Parameter
    assert (copied.name, bits(copied.data), bits(copied.grad)) == (
        "w",
        bits(param.data),
        bits(param.grad),
    )
    assert not np.shares_memory(copied.data, param.data)
    assert not np.shares_memory(copied.grad, param.grad)
