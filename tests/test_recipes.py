"""A recipe computes what the paper or the program that it is of writes out."""

import re
from pathlib import Path

import numpy as np
import pytest
import rmsprop
import torch
from rmsprop import dialect
from rmsprop.torch import RMSprop as TorchRMSprop

RECIPES = Path(__file__).parents[1] / "docs" / "recipes.md"
ROW = re.compile(
    r"^\| (?P<name>[^|`]+) \| `(?P<call>RMSprop\(.+\))` \| .+ \|$", re.MULTILINE
)
CALLS = {m["name"]: m["call"] for m in ROW.finditer(RECIPES.read_text())}
STEPS = 50


def clipped(g, norm):
    return g * min(1, norm / (np.linalg.norm(g) + 1e-6))


# The formulas of the sources, each with its own constants. A generator is sent a gradient and
# yields what is to be added to the parameters.


def dqn(w):
    """g and g2 decay by 0.95; w += lr * dw / sqrt(g2 - g * g + 0.01), where dw points uphill."""
    g, g2, change = 0 * w, 0 * w, None
    while True:
        dw = -(yield change)
        g = 0.95 * g + 0.05 * dw
        g2 = 0.95 * g2 + 0.05 * dw * dw
        change = 2.5e-4 * dw / np.sqrt(g2 - g * g + 0.01)


def tensorflow1(lr, decay, epsilon, momentum=0.0, centered=False, start=1.0, norm=None):
    """ms += (g^2 - ms) (1 - decay); mom = momentum mom + lr g / sqrt(ms - mg^2 + epsilon)."""

    def formula(w):
        ms, mg, mom, change = 0 * w + start, 0 * w, 0 * w, None
        while True:
            g = yield change
            g = g if norm is None else clipped(g, norm)
            ms = ms + (g * g - ms) * (1 - decay)
            mg = mg + (g - mg) * (1 - decay) if centered else mg
            mom = momentum * mom + lr * g / np.sqrt(ms - mg * mg + epsilon)
            change = -mom

    return formula


def torch_like(lr, alpha, eps, norm=None):
    """v = alpha v + (1 - alpha) g^2; p -= lr g / (sqrt(v) + eps)."""

    def formula(w):
        v, change = 0 * w, None
        while True:
            g = yield change
            g = g if norm is None else clipped(g, norm)
            v = alpha * v + (1 - alpha) * g**2
            change = -lr * g / (np.sqrt(v) + eps)

    return formula


def tf_like(w):
    """As torch, but v starts at one and eps is in the root."""
    v, change = 0 * w + 1, None
    while True:
        g = clipped((yield change), 0.5)
        v = 0.99 * v + 0.01 * g**2
        change = -7e-4 * g / np.sqrt(v + 1e-5)


def timm(lr):
    """L2; an average that starts at one; momentum of steps, lr included."""

    def formula(w):
        w, v, b, change = w.copy(), 0 * w + 1, 0 * w, None
        while True:
            g = (yield change) + 1e-5 * w
            v = v + 0.1 * (g**2 - v)
            b = 0.9 * b + lr * g / np.sqrt(v + 1e-3)
            change = -b
            w = w + change

    return formula


def graves(w):
    """n and g decay by 0.95; delta = 0.9 delta - 1e-4 e / sqrt(n - g^2 + 1e-4); w += delta."""
    n, g, delta = 0 * w, 0 * w, 0 * w
    e = yield None
    while True:
        n = 0.95 * n + 0.05 * e**2
        g = 0.95 * g + 0.05 * e
        delta = 0.9 * delta - 1e-4 * e / np.sqrt(n - g**2 + 1e-4)
        e = yield delta


def keras3(w):
    """velocity = rho velocity + (1 - rho) g^2; variable -= lr g / sqrt(velocity + epsilon)."""
    velocity, change = 0 * w, None
    while True:
        g = yield change
        velocity = 0.9 * velocity + (1 - 0.9) * g**2
        change = -1e-3 * g / np.sqrt(velocity + 1e-7)


FORMULAS = {
    "DQN (Nature)": dqn,
    "Dopamine DQN": tensorflow1(2.5e-4, 0.95, 1e-5, centered=True),
    "A3C": tensorflow1(7e-4, 0.99, 0.1, start=0.0, norm=40),
    "IMPALA": tensorflow1(4.8e-4, 0.99, 0.1, norm=40),
    "TorchBeast": torch_like(4.8e-4, 0.99, 0.01, norm=40),
    "SB3 A2C": torch_like(7e-4, 0.99, 1e-5, norm=0.5),
    "SB3 A2C as in Stable-Baselines 2": tf_like,
    "PyMARL (QMIX)": torch_like(5e-4, 0.99, 1e-5, norm=10),
    "EfficientNet, TensorFlow": tensorflow1(0.256, 0.9, 1e-3, momentum=0.9),
    "EfficientNet, timm": timm(0.048),
    "MobileNetV3, timm": timm(0.064),
    "Inception v3": tensorflow1(0.1, 0.9, 1.0, momentum=0.9),
    "WGAN": torch_like(5e-5, 0.99, 1e-8),
    "Graves": graves,
    "Keras 1 and 2, tf.keras without momentum": torch_like(1e-3, 0.9, 1e-7),
    "tf.keras with momentum": tensorflow1(1e-3, 0.9, 1e-7, momentum=0.9, start=0.0),
    "Keras 3": keras3,
}


def trained(name, make):
    """The parameters after each step, beside what the formula makes of them."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=200)
    formula = FORMULAS[name](w)
    next(formula)
    params, step, now = make(w)
    wanted = w.copy()
    opt = eval(CALLS[name], {**make.names, "params": params, "dialect": dialect})
    for scale in rng.uniform(0, 10, STEPS):
        g = scale * rng.normal(size=200)
        step(opt, params, g)
        wanted = wanted + formula.send(g)
    return now(params), wanted


def arrays(w):
    def step(opt, _, g):
        opt.step(grads=[g])

    return [w.copy()], step, lambda params: params[0]


def tensors(w):
    def step(opt, params, g):
        params[0].grad = torch.from_numpy(g)
        opt.step()

    return [torch.tensor(w)], step, lambda params: params[0].numpy()


arrays.names = {"RMSprop": rmsprop.RMSprop}
tensors.names = {"RMSprop": TorchRMSprop}


def test_every_row_has_its_formula():
    assert list(CALLS) == list(FORMULAS)


@pytest.mark.parametrize("make", [arrays, tensors])
@pytest.mark.parametrize("name", FORMULAS)
def test_recipe(name, make):
    found, wanted = trained(name, make)
    assert found == pytest.approx(wanted, rel=1e-11, abs=1e-13)
