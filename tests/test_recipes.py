"""A recipe computes what the paper or the program that it is of writes out."""

import numpy as np
import pytest
from rmsprop import RMSprop, dialect


def test_dqn():
    """DeepMind's NeuralQLearner: g and g2 decay by 0.95, w += lr * dw / sqrt(g2 - g * g + 0.01), uphill."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=200)
    wanted, g, g2 = w.copy(), np.zeros(200), np.zeros(200)
    opt = RMSprop([w], lr=2.5e-4, **dialect("dqn", maximize=True))
    for _ in range(50):
        dw = rng.normal(size=200)
        opt.step(grads=[dw])
        g = 0.95 * g + 0.05 * dw
        g2 = 0.95 * g2 + 0.05 * dw * dw
        wanted += 2.5e-4 * dw / np.sqrt(g2 - g * g + 0.01)
    assert w == pytest.approx(wanted, rel=1e-13)
