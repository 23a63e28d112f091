"""The examples of OneFlow's RMSprop page run as written, and follow its equations.

`flow.optim.RMSprop` is `rmsprop.RMSprop` here, `net` a NumPy network and `loss.backward()`
its gradient, which adds to `.grad` as autograd does, so that `zero_grad()` matters. The
expected numbers come from the page's equations in float64 NumPy.

Source: python/oneflow/nn/optimizer/rmsprop.py of Oneflow-Inc/oneflow, master of 2025-08.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import rmsprop
from rmsprop import Parameter, RMSprop

flow = SimpleNamespace(optim=rmsprop)

EPOCHS = 80
DTYPES = [np.float32, np.float64]

Arrays = list[np.ndarray]


def initial(dtype: type) -> Arrays:
    rng = np.random.default_rng(0)
    shapes = [(4, 8), (8,), (8, 1), (1,)]
    return [rng.normal(0, 0.2, shape).astype(dtype) for shape in shapes]


def data(dtype: type) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(32, 4))
    y = np.sin(x[:, :1]) + 0.3 * x[:, 1:2] * x[:, 2:3]
    return x.astype(dtype), y.astype(dtype)


def loss_and_grads(
    params: Arrays, x: np.ndarray, y: np.ndarray
) -> tuple[float, Arrays]:
    """Mean square error of a network with one tanh layer, and its gradients."""
    w1, b1, w2, b2 = params
    hidden = np.tanh(x @ w1 + b1)
    error = hidden @ w2 + b2 - y
    d = 2 * error / len(x)
    d_hidden = (d @ w2.T) * (1 - hidden * hidden)
    grads = [x.T @ d_hidden, d_hidden.sum(axis=0), hidden.T @ d, d.sum(axis=0)]
    return float((error * error).mean()), grads


class Loss:
    """A number that knows its gradients."""

    def __init__(self, params: list[Parameter], value: float, grads: Arrays) -> None:
        self.params, self.value, self.grads = params, value, grads

    def backward(self) -> None:
        for param, grad in zip(self.params, self.grads):
            if param.grad is None:
                param.grad = grad
            else:
                param.grad += grad


class Net:
    """A custom model, as the page says."""

    def __init__(self, dtype: type) -> None:
        self.params = [Parameter(array) for array in initial(dtype)]
        self.losses: list[float] = []

    def parameters(self) -> Iterator[Parameter]:
        """A generator, as in the frameworks: it can be read only once."""
        yield from self.params

    def loss(self, x: np.ndarray, y: np.ndarray) -> Loss:
        value, grads = loss_and_grads([p.data for p in self.params], x, y)
        self.losses.append(value)
        return Loss(self.params, value, grads)


def example_1(net: Net, x: np.ndarray, y: np.ndarray, **options: object) -> None:
    rmsprop = flow.optim.RMSprop(net.parameters(), lr=1e-3, **options)

    for epoch in range(EPOCHS):
        loss = net.loss(x, y)
        loss.backward()
        rmsprop.step()
        rmsprop.zero_grad()


def example_2(net: Net, x: np.ndarray, y: np.ndarray, **options: object) -> None:
    learning_rate = 0.001
    rmsprop = flow.optim.RMSprop(
        [
            {
                "params": net.parameters(),
                "lr": learning_rate,
                "clip_grad_max_norm": 0.5,
                "clip_grad_norm_type": 2.0,
            }
        ],
        **options,
    )

    for epoch in range(EPOCHS):
        loss = net.loss(x, y)
        loss.backward()
        rmsprop.clip_grad()
        rmsprop.step()
        rmsprop.zero_grad()


class Expected:
    """The page's equations: r, g and v are its symbols, the rest are the defaults."""

    def __init__(
        self, beta: float = 0.0, centered: bool = False, max_norm: float = np.inf
    ) -> None:
        lr, alpha, eps = 0.001, 0.99, 1e-8
        self.params, self.losses, self.norms = initial(np.float64), [], []
        r, g, v = ([np.zeros_like(w) for w in self.params] for _ in range(3))
        for epoch in range(EPOCHS):
            loss, grads = loss_and_grads(self.params, *data(np.float64))
            self.losses.append(loss)
            self.norms.append(np.sqrt(sum((grad * grad).sum() for grad in grads)))
            clip = min(1.0, max_norm / (self.norms[-1] + 1e-6))
            for i, w in enumerate(self.params):
                grad = clip * grads[i]
                r[i] = alpha * r[i] + (1 - alpha) * grad**2
                g[i] = alpha * g[i] + (1 - alpha) * grad
                variance = r[i] - g[i] ** 2 if centered else r[i]
                v[i] = beta * v[i] + lr / np.sqrt(variance + eps) * grad
                w -= v[i]

    def check(self, net: Net) -> None:
        """Tolerances leave room for rounding only, carried through all the epochs."""
        is_single = net.params[0].data.dtype == np.float32
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if is_single else {"rtol": 1e-10}
        np.testing.assert_allclose(net.losses, self.losses, **tolerance)
        for param, w in zip(net.params, self.params):
            np.testing.assert_allclose(param.data, w, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_example_1(dtype: type) -> None:
    net = Net(dtype)
    example_1(net, *data(dtype))
    Expected().check(net)
    assert net.losses[-1] < 0.5 * net.losses[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_example_2_clips(dtype: type) -> None:
    net, expected = Net(dtype), Expected(max_norm=0.5)
    example_2(net, *data(dtype))
    expected.check(net)
    assert min(expected.norms) < 0.5 < max(expected.norms), "both sides of the limit"


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equations(dtype: type, beta: float, centered: bool) -> None:
    """With momentum too, which the page prints and OneFlow refuses."""
    net = Net(dtype)
    example_1(net, *data(dtype), momentum=beta, centered=centered)
    Expected(beta=beta, centered=centered).check(net)


@pytest.mark.parametrize("example", [example_1, example_2])
def test_contiguous_params_changes_no_bit(example: Callable[..., None]) -> None:
    """In OneFlow example 2 trains nothing with it: the generator has been read."""
    plain, flat = Net(np.float32), Net(np.float32)
    example(plain, *data(np.float32))
    example(flat, *data(np.float32), contiguous_params=True)
    assert flat.losses == plain.losses
    for a, b in zip(flat.params, plain.params):
        np.testing.assert_array_equal(a.data, b.data)


def test_positional_arguments_and_defaults() -> None:
    """The page's signature, in its order."""
    params = Net(np.float32).params
    default = RMSprop(params).param_groups[0]
    positional = RMSprop(params, 1e-3, 0.99, 1e-8, 0, 0.0, False, False)
    page = {
        "lr": 1e-3,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0,
        "momentum": 0.0,
        "centered": False,
    }
    for group in (default, positional.param_groups[0]):
        assert {key: group[key] for key in page} == page
