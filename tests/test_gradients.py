"""Gradients come from `grads=` or `.grad`; a parameter whose gradient is None is left out of the step."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from problems import (
    NAMES,
    SHAPES,
    bits,
    gradients_for,
    random_arrays,
    random_parameters,
)
from producers import Handmade, Legacy, Versioned
from rmsprop import Parameter, RMSprop

OPTIONS = {"momentum": 0.9, "weight_decay": 0.1}


def make(contiguous):
    params = [
        Parameter(array, name)
        for array, name in zip(random_arrays(0), NAMES, strict=True)
    ]
    return params, RMSprop(params, **OPTIONS, contiguous_params=contiguous)


def result(params, opt):
    return bits([params, opt.state_dict()["state"]])


HANDED_OVER = {
    "list": list,
    "tuple": tuple,
    "generator": iter,
    "mapping": lambda grads: dict(zip(NAMES, grads, strict=True)),
    "mapping in another order": lambda grads: dict(
        reversed(list(zip(NAMES, grads, strict=True)))
    ),
}


@pytest.mark.parametrize("missing", [(), (1,), (0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("form", HANDED_OVER)
def test_grads_argument_equals_grad_attribute(form, missing, contiguous):
    (params, opt), (expected_params, expected) = (
        make(contiguous),
        make(contiguous=False),
    )
    for seed in range(3):
        grads = gradients_for(params, seed)
        for index in missing:
            grads[index] = None
        opt.step(grads=HANDED_OVER[form](grads))
        for param, grad in zip(expected_params, grads, strict=True):
            param.grad = grad
        expected.step()
    assert result(params, opt) == result(expected_params, expected)


@pytest.mark.parametrize("by_argument", [False, True], ids=["grad", "grads="])
def test_none_leaves_the_parameter_out(by_argument, contiguous):
    """Not even weight decay or momentum moves it, and its `step` does not count."""
    params, opt = make(contiguous)
    opt.step(grads=gradients_for(params, 1))
    before = bits([params[2], opt.state_dict()["state"][2]])
    grads = gradients_for(params, 2)
    grads[2] = None
    if by_argument:
        opt.step(grads=grads)
    else:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        opt.step()
    assert bits([params[2], opt.state_dict()["state"][2]]) == before
    assert [opt.state[index]["step"] for index in range(4)] == [2, 2, 1, 2]


def test_grads_argument_goes_before_grad_attribute(contiguous):
    (params, opt), (expected_params, expected) = make(contiguous), make(contiguous)
    grads = gradients_for(params, 1)
    for param in params:
        param.grad = np.full(param.shape, 7, np.float32)
    opt.step(grads=grads)
    expected.step(grads=grads)
    assert result(params, opt) == result(expected_params, expected)
    assert all((param.grad == 7).all() for param in params)


class Weights(np.ndarray):
    """An array of somebody's own that has a gradient."""

    grad = None


def with_grad(param, grad):
    param.grad = grad
    return param


OWNERS = {
    "Parameter": lambda array, grad: with_grad(Parameter(array), grad),
    "subclass of ndarray": lambda array, grad: with_grad(array.view(Weights), grad),
    "tensor": lambda array, grad: with_grad(
        torch.from_numpy(array), torch.from_numpy(grad)
    ),
    "torch Parameter": lambda array, grad: with_grad(
        torch.nn.Parameter(torch.from_numpy(array)), torch.from_numpy(grad)
    ),
}


@pytest.mark.filterwarnings("ignore:params. torch's modules")
@pytest.mark.parametrize("owner", OWNERS)
def test_owners_of_grad(owner):
    arrays, grads = random_arrays(0), random_arrays(1)
    expected = random_arrays(0)
    RMSprop(expected, **OPTIONS).step(grads=grads)
    params = [
        OWNERS[owner](array, grad) for array, grad in zip(arrays, grads, strict=True)
    ]
    opt = RMSprop(params, **OPTIONS)
    opt.step()
    assert bits(arrays) == bits(expected)
    opt.zero_grad()
    assert not any(np.asarray(param.grad).any() for param in params)
    assert not any(grad.any() for grad in grads)
    opt.zero_grad(set_to_none=True)
    assert all(param.grad is None for param in params)


def readonly(grad):
    grad.flags.writeable = False
    return grad


def negative(grad):
    return grad[..., ::-1].copy()[..., ::-1]


KINDS = {
    "read-only": readonly,
    "Fortran order": lambda grad: np.array(grad, order="F"),
    "negative strides": lambda grad: negative(grad) if grad.ndim else grad,
    "tensor": torch.from_numpy,
    "torch Parameter": lambda grad: torch.nn.Parameter(torch.from_numpy(grad)),
    "transposed tensor": lambda grad: torch.permute(
        torch.from_numpy(grad.T.copy()), tuple(reversed(range(grad.ndim)))
    ),
    "JAX": jnp.asarray,
    "Parameter": Parameter,
    "versioned capsule": Versioned,
    "read-only capsule": lambda grad: Versioned(readonly(grad)),
    "legacy capsule": Legacy,
    "capsule without strides": lambda grad: Handmade(grad, has_strides=False),
    "capsule with an offset": lambda grad: Handmade(grad, byte_offset=64),
    "buffer": memoryview,
    "read-only buffer": lambda grad: memoryview(grad).toreadonly(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_gradients(kind, contiguous):
    (params, opt), (expected_params, expected) = (
        make(contiguous),
        make(contiguous=False),
    )
    for seed in range(2):
        grads = gradients_for(params, seed)
        expected.step(grads=grads)
        opt.step(grads=[KINDS[kind](grad) for grad in grads])
    assert result(params, opt) == result(expected_params, expected)


@pytest.mark.parametrize(
    "broadcast",
    [
        lambda value, shape: np.broadcast_to(np.float32(value), shape),
        lambda value, shape: torch.tensor(value).expand(shape),
    ],
    ids=["NumPy", "torch"],
)
def test_broadcast_gradients(broadcast, contiguous):
    """Autograd's gradient of a sum is one element with strides of 0."""
    (params, opt), (expected_params, expected) = (
        make(contiguous),
        make(contiguous=False),
    )
    opt.step(grads=[broadcast(0.5, shape) for shape in SHAPES])
    expected.step(grads=[np.full(shape, 0.5, np.float32) for shape in SHAPES])
    assert result(params, opt) == result(expected_params, expected)


def test_gradients_may_share_memory(contiguous):
    (params, opt), (expected_params, expected) = (
        make(contiguous),
        make(contiguous=False),
    )
    memory = random_arrays(5, [(64,)])[0]
    grads = [memory[: param.size].reshape(param.shape) for param in params]
    opt.step(grads=grads)
    expected.step(grads=[grad.copy() for grad in grads])
    assert result(params, opt) == result(expected_params, expected)


def test_zero_grad(contiguous):
    params = random_parameters(0)
    params[1].grad = None
    opt = RMSprop(params, contiguous_params=contiguous)
    opt.zero_grad()
    assert [param.grad is None for param in params] == [False, True, False, False]
    assert all((param.grad == 0).all() for param in params if param.grad is not None)
    opt.zero_grad(set_to_none=True)
    assert all(param.grad is None for param in params)
    before = bits([params, opt.state_dict()])
    opt.step()
    assert bits([params, opt.state_dict()]) == before


def test_zero_grad_writes_in_place(contiguous):
    """By default the gradient stays the same object, which others may hold."""
    params = random_parameters(0)
    opt = RMSprop(params, contiguous_params=contiguous)
    grads = [param.grad for param in params]
    opt.zero_grad()
    assert all(not grad.any() for grad in grads)
    assert all(np.shares_memory(param.grad, grad) for param, grad in zip(params, grads))


def test_zero_grad_leaves_plain_arrays_alone():
    RMSprop(random_arrays(0)).zero_grad()
