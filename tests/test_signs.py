"""A tensor with a pending sign, as `z.conj().imag` has, counts as the numbers it stands for, at every step, or is refused."""

import numpy as np
import pytest
import rmsprop
import torch
from rmsprop.torch import RMSprop
from torch_pairs import FORMS, OWN, bits, normal

#: Real views of 8 complex numbers whose sign is in a bit that their memory does not show.
VIEWS = {
    "spread": lambda z: z.conj().imag,
    "dense": lambda z: z.conj().imag.as_strided((15,), (1,)),
    "dense, of all the memory": lambda z: z.conj().imag.as_strided((16,), (1,), 0),
    "dense, two dimensions": lambda z: z.conj().imag.as_strided((3, 5), (5, 1)),
    "transposed": lambda z: z.conj().imag.as_strided((3, 5), (1, 3)),
    "one element": lambda z: z[:1].conj().imag,
    "no dimension": lambda z: z[0].conj().imag,
}
EVERY_VIEW = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
OPTIONS = {
    **FORMS,
    "own": {**FORMS["all"], **OWN},
    "norm": {"max_grad_norm": 0.1, "nonfinite": "skip"},
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def signed(view, seed, dtype=torch.complex64):
    tensor = view(torch.complex(*[normal((seed, k), (8,)) for k in (1, 2)]).to(dtype))
    assert tensor.is_neg()
    return tensor


@EVERY_OPTION
@EVERY_VIEW
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_gradients(view, options, dtype):
    """Now and then, beside others."""
    shape = signed(view, 0).shape
    made = []
    for resolve in (lambda grad: grad, torch.Tensor.resolve_neg):
        params = [normal(k, shape, dtype.to_real()).requires_grad_() for k in range(3)]
        opt = RMSprop(params, **options)
        for seed in range(6):
            for k, param in enumerate(params):
                param.grad = normal((seed, k), shape, dtype.to_real())
            if seed % 3:
                params[1].grad = resolve(signed(view, seed, dtype))
            opt.step()
        made.append([params, [opt.state[param] for param in params]])
    assert bits(made[0]) == bits(made[1])


@EVERY_VIEW
def test_the_same_gradient_again(view):
    """It keeps its sign, and what it stands for."""
    memory = torch.complex(*[normal(k, (8,)) for k in (1, 2)])
    grad = view(memory)
    made = []
    for resolve in (lambda grad: grad, torch.Tensor.resolve_neg):
        param = normal(0, grad.shape).requires_grad_()
        opt = RMSprop([param], momentum=0.9)
        for _ in range(4):
            param.grad = resolve(grad)
            opt.step()
        made.append([param, opt.state[param]])
    assert bits(made[0]) == bits(made[1])
    assert grad.is_neg()
    assert torch.equal(grad, view(memory))


@EVERY_VIEW
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_parameters(view, form):
    """Where one is a leaf of its own; up to rounding, for torch may step it."""
    param = signed(view, 0).detach().requires_grad_()
    same = param.detach().resolve_neg().clone().requires_grad_()
    assert param.is_neg()
    opts = [RMSprop([one], **form) for one in (param, same)]
    for seed in range(4):
        for one, opt in zip((param, same), opts, strict=True):
            one.grad = normal(seed, param.shape)
            opt.step()
        torch.testing.assert_close(param, same, rtol=1e-5, atol=1e-6)
    assert param.is_neg()


@EVERY_VIEW
def test_a_parameter_that_gets_a_sign(view):
    """Between two steps; its state stays what it was."""
    shape = signed(view, 0).shape
    made = []
    for resolve in (lambda tensor: tensor, torch.Tensor.resolve_neg):
        param = normal(0, shape).requires_grad_()
        opt = RMSprop([param], momentum=0.9)
        for seed in range(4):
            param.grad = normal(seed, shape)
            if seed == 2:
                param.data = resolve(signed(view, 0))
            opt.step()
        made.append([param, *opt.state[param].values()])
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-6)


# --- arrays -----------------------------------------------------------------------------------


def is_refused(function, *args, **keywords):
    """Whether a call is, for the sign."""
    try:
        function(*args, **keywords)
    except ValueError as error:
        assert "negat" in str(error)
        return True
    return False


@EVERY_VIEW
def test_gradients_of_arrays(view):
    shape = signed(view, 0).shape
    params, same = (np.zeros(shape, np.float32) for _ in range(2))
    opt, expected = rmsprop.RMSprop([params]), rmsprop.RMSprop([same])
    for seed in range(4):
        grad = signed(view, seed)
        if not is_refused(opt.step, grads=[grad]):
            expected.step(grads=[grad.resolve_neg()])
        for one in (opt, expected):
            one.step(grads=[normal(seed, shape)])
    assert (params == same).all()


@EVERY_VIEW
def test_parameters_of_arrays(view):
    param, same = signed(view, 0), signed(view, 0).resolve_neg().clone()
    if is_refused(rmsprop.RMSprop, [param]):
        return
    for one in (param, same):
        rmsprop.RMSprop([one], lr=0.5).step(grads=[torch.ones(one.shape)])
    assert torch.equal(param, same)


@EVERY_VIEW
def test_a_parameter_of_arrays_that_gets_a_sign(view):
    """Between two steps; a refused one writes nothing."""
    tensor, same = torch.zeros(signed(view, 0).shape), signed(view, 0).resolve_neg()
    opt = rmsprop.RMSprop([tensor], lr=0.5)
    opt.step(grads=[None])
    tensor.data = signed(view, 0)
    grad = torch.ones(tensor.shape)
    if not is_refused(opt.step, grads=[grad]):
        rmsprop.RMSprop([same], lr=0.5).step(grads=[grad])
    assert torch.equal(tensor, same)
