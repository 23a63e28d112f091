"""After `zero_grad` a gradient is zero, in place if it can be written, else in an array of its own."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from problems import bits, random_arrays
from rmsprop import Parameter, RMSprop


def readonly(array):
    array.flags.writeable = False
    return array


READ_ONLY = {
    "JAX": jnp.asarray,
    "ndarray": readonly,
    "broadcast": lambda grad: np.broadcast_to(np.float32(2), grad.shape),
    "scalar": lambda grad: np.float32(2) if grad.ndim == 0 else readonly(grad),
    "Parameter": lambda grad: Parameter(readonly(grad)),
}
WRITABLE = {
    "ndarray": lambda grad: grad,
    "Parameter": Parameter,
    "tensor": torch.from_numpy,
    "buffer": memoryview,
}


def with_gradients(make):
    params = [Parameter(array) for array in random_arrays(0)]
    for param, grad in zip(params, random_arrays(1), strict=True):
        param.grad = make(grad)
    return params


@pytest.mark.parametrize("make", READ_ONLY.values(), ids=READ_ONLY)
def test_read_only_gradients_are_replaced(make, contiguous):
    params = with_gradients(make)
    old = [param.grad for param in params]
    before = bits(old)
    opt = RMSprop(params, contiguous_params=contiguous)
    opt.zero_grad()
    for param in params:
        assert bits(param.grad) == bits(np.zeros(param.shape, np.float32))
        param.grad[...] = 1  # the next backward pass may write
    assert bits(old) == before
    opt.step()
    opt.zero_grad(set_to_none=True)
    assert all(param.grad is None for param in params)


@pytest.mark.parametrize("make", WRITABLE.values(), ids=WRITABLE)
def test_writable_gradients_stay_the_same_objects(make):
    params = with_gradients(make)
    old = [param.grad for param in params]
    RMSprop(params).zero_grad()
    assert all(param.grad is grad for param, grad in zip(params, old, strict=True))
    assert not any(np.asarray(grad).any() for grad in old)
