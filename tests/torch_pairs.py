"""`torch.optim.RMSprop` and ours on equal parameters and gradients, and what came of it."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from rmsprop.torch import RMSprop

Stock = torch.optim.RMSprop
CLASSES = (Stock, RMSprop)

SHAPES = ((7, 5), (11,), (), (2, 3, 4))

#: The arguments torch's class has, and every form of the rule they choose.
FORMS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "all": {
        "weight_decay": 0.1,
        "momentum": 0.9,
        "centered": True,
        "maximize": True,
    },
}
#: Arguments of ours that are none of torch's; each differs from its default.
OWN = {
    "eps_in_sqrt": True,
    "initial_square_avg": 1.0,
    "lr_in_momentum": True,
    "nesterov": True,
    "bias_correction": True,
    "decoupled_weight_decay": True,
    "clip_weights": 0.01,
    "ema_decay": 0.5,
}


@dataclass
class Side:
    """Parameters and the optimizer that trains them."""

    params: list[torch.Tensor]
    opt: torch.optim.Optimizer

    def set_gradients(self, seed):
        for index, param in enumerate(self.params):
            param.grad = normal((seed, index), param.shape, param.dtype)

    def train(self, seeds):
        for seed in seeds:
            self.set_gradients(seed)
            self.opt.step()

    def state(self):
        return [self.opt.state.get(param, {}) for param in self.params]


def normal(seed, shape=(3,), dtype=torch.float32):
    """Standard normal numbers, always the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.standard_normal(shape), dtype=dtype)


def parameters(seed=0, shapes=SHAPES, dtype=torch.float32):
    return [
        normal((seed, 99, index), shape, dtype).requires_grad_()
        for index, shape in enumerate(shapes)
    ]


def build(cls, *, seed=0, shapes=SHAPES, dtype=torch.float32, **options):
    params = parameters(seed, shapes, dtype)
    return Side(params, cls(params, **options))


def both(**options):
    """Stock and ours, built alike."""
    return build(Stock, **options), build(RMSprop, **options)


def train_both(sides, seeds):
    for side in sides:
        side.train(seeds)


def assert_same(stock, ours, rounded_as=None):
    """Equal parameters and equal state, up to rounding; keys, types and layouts exactly."""
    assert_close(ours.params, stock.params, rounded_as)
    for mine, its in zip(ours.state(), stock.state(), strict=True):
        assert list(mine) == list(its)
        assert_close(list(mine.values()), list(its.values()), rounded_as)


def assert_close(ours, stock, rounded_as=None):
    """Up to the rounding errors of `rounded_as`, or else of the tensors' own type."""
    for mine, its in zip(ours, stock, strict=True):
        assert type(mine) is type(its)
        single = torch.float32 in (mine.dtype, rounded_as)
        rtol, atol = (1e-5, 4e-6) if single else (1e-12, 1e-13)
        torch.testing.assert_close(
            mine, its, rtol=rtol, atol=atol, equal_nan=True, check_stride=True
        )


def bits(tree):
    """Equal for two trees of tensors exactly when every bit is."""
    if isinstance(tree, Mapping):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(value) for value in tree]
    if isinstance(tree, torch.Tensor):
        array = tree.detach().numpy()
        return str(tree.dtype), tuple(tree.shape), array.tobytes()
    return tree


def snapshot(side):
    """Every bit of the parameters and of the state."""
    return bits([side.params, side.state()])


def outcome(function, *args):
    """What a call says: warnings and an exception, each as its type and text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function(*args)
            said = []
        except Exception as error:  # noqa: BLE001 - whatever it is gets compared
            said = [(type(error), str(error))]
    return [(w.category, str(w.message)) for w in caught] + said
