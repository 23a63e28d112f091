"""Promise: cautious and corrected weight decay and the clipping of weights are as written, in both fronts.

Bits of every combination beside the oracle are in test_bits.py; instruction sets in test_isa.py.
"""

import copy
import pickle

import numpy as np
import pytest
import rmsprop
import torch
from oracle import Oracle
from problems import bits, random_arrays, wild_array
from rmsprop import RMSprop
from rmsprop.torch import RMSprop as TorchRMSprop

DECOUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": True}
CASES = {
    "cautious": {**DECOUPLED, "cautious_weight_decay": True},
    "cautious, nesterov": {
        **DECOUPLED,
        "cautious_weight_decay": True,
        "momentum": 0.9,
        "nesterov": True,
    },
    "corrected": {**DECOUPLED, "corrected_weight_decay": True},
    "clipped": {"clip_weights": 0.01},
    "all": {
        **DECOUPLED,
        "cautious_weight_decay": True,
        "corrected_weight_decay": True,
        "clip_weights": 0.5,
        "momentum": 0.9,
        "centered": True,
        "max_grad_norm": 1.0,
    },
}
EACH = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


@EACH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_fronts(options, dtype, contiguous):
    """Large and wild arrays, with a learning rate that falls; the same bits as the oracle's."""
    start = [*random_arrays(0), wild_array(1, 5000, dtype)]
    arrays = [rmsprop.Parameter(a.copy()) for a in start]
    tensors = [torch.nn.Parameter(torch.tensor(a)) for a in start]
    wanted = [a.copy() for a in start]
    oracle = Oracle(wanted, lr=0.01, **options)
    opt = RMSprop(arrays, lr=0.01, contiguous_params=contiguous, **options)
    torchs = TorchRMSprop(
        tensors,
        lr=0.01,
        eps_in_sqrt=True,
        lr_in_momentum=True,
        contiguous_params=contiguous,
        **options,
    )
    for seed in range(1, 4):
        grads = [
            *random_arrays(seed),
            np.random.default_rng(seed).normal(size=5000).astype(dtype),
        ]
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(grad)
        oracle.step(grads)
        opt.step(grads=grads)
        torchs.step()
        lr = 0.01 / (1 + seed)
        oracle.options.lr = lr
        opt.lr = lr
        torchs.param_groups[0]["lr"] = lr
    assert bits([p.data for p in arrays]) == bits(wanted)
    assert bits([t.detach().numpy() for t in tensors]) == bits(wanted)


def test_cautious_decay_follows_the_update():
    """A large first step in the direction of -g; decay of p where that goes towards 0, and of no other."""
    p = np.array([1.0, 1.0, -1.0, -1.0, 0.0, np.nan])
    g = np.array([1.0, -1.0, 1.0, -1.0, 1.0, 1.0])
    found, plain = p.copy(), p.copy()
    RMSprop([found], lr=0.1, cautious_weight_decay=True, **DECOUPLED).step(grads=[g])
    RMSprop([plain], lr=0.1).step(grads=[g])
    np.testing.assert_allclose(
        plain - found, [0.01, 0, 0, -0.01, 0, np.nan], rtol=1e-12
    )


def groups_of(front):
    """An optimizer with corrected decay, its group, and a function that steps it."""
    if front == "arrays":
        w = np.ones(4, np.float32)
        opt = RMSprop([w], lr=0.1, corrected_weight_decay=True, **DECOUPLED)
        return opt, lambda: opt.step(grads=[np.zeros(4, np.float32)]), lambda: w[0]
    w = torch.nn.Parameter(torch.ones(4))
    opt = TorchRMSprop([w], lr=0.1, corrected_weight_decay=True, **DECOUPLED)

    def step():
        w.grad = torch.zeros(4)
        opt.step()

    return opt, step, lambda: w[0].item()


FRONTS = pytest.mark.parametrize("front", ["arrays", "torch"])


@FRONTS
def test_initial_lr_is_that_of_the_first_step(front):
    """The constructor writes no key that a scheduler would take for its own; the first step does."""
    opt, step, value = groups_of(front)
    (group,) = opt.param_groups
    assert "initial_lr" not in group
    group["lr"] = 0.2
    step()
    assert group["initial_lr"] == 0.2
    group["lr"] = 0.1
    before = value()
    step()
    assert value() / before == pytest.approx(1 - 0.1 * 0.1 / 0.2 * 0.1, rel=1e-6)
    assert group["initial_lr"] == 0.2


@FRONTS
@pytest.mark.parametrize(
    ("initial_lr", "factor"), [(0.4, 0.1 * 0.1 / 0.4), (0.0, 0.1), (1, 0.01)]
)
def test_initial_lr_counts_as_it_is_now(front, initial_lr, factor):
    opt, step, value = groups_of(front)
    opt.param_groups[0]["initial_lr"] = 7.0
    step()
    opt.param_groups[0]["initial_lr"] = initial_lr
    before = value()
    step()
    assert value() / before == pytest.approx(1 - factor * 0.1, rel=1e-6)


@FRONTS
@pytest.mark.parametrize(
    ("initial_lr", "error"),
    [(-1.0, ValueError), (np.inf, ValueError), ("a", Exception)],
)
def test_a_bad_initial_lr(front, initial_lr, error):
    opt, step, value = groups_of(front)
    step()
    before = value()
    opt.param_groups[0]["initial_lr"] = initial_lr
    with pytest.raises(error, match="initial_lr"):
        step()
    assert value() == before
    opt.param_groups[0]["corrected_weight_decay"] = False  # then it is not ours
    step()


def test_a_scheduler_of_torch():
    opt, step, value = groups_of("torch")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    wanted = value()
    for lr in (0.1, 0.05, 0.025):
        step()
        scheduler.step()
        wanted *= 1 - lr * lr / 0.1 * 0.1
        assert value() == pytest.approx(wanted, rel=1e-6)


def test_a_step_that_fails_writes_no_initial_lr():
    w = np.ones(4, np.float32)
    opt = RMSprop([w], nonfinite="raise", corrected_weight_decay=True, **DECOUPLED)
    with pytest.raises(FloatingPointError):
        opt.step(grads=[np.full(4, np.nan, np.float32)])
    assert "initial_lr" not in opt.param_groups[0]


def test_checkpoints_keep_it():
    opt, step, _ = groups_of("arrays")
    step()
    opt.lr = 0.01
    for other in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
        assert other.param_groups[0]["initial_lr"] == 0.1
    new, _, _ = groups_of("arrays")
    new.load_state_dict(opt.state_dict())
    assert new.param_groups[0]["initial_lr"] == 0.1


def test_clipping():
    """Infinities are clipped, a NaN stays one, and a limit that comes later counts at the next step."""
    p = np.array([np.inf, -np.inf, np.nan, 3.0, -0.5])
    opt = RMSprop([p], lr=0.0)
    grads = [np.zeros(5)]
    opt.step(grads=grads)
    assert p[0] == np.inf
    opt.clip_weights = 1.0
    opt.step(grads=grads)
    np.testing.assert_array_equal(p, [1.0, -1.0, np.nan, 1.0, -0.5])
    opt.clip_weights = 0.25
    opt.step(grads=grads)
    np.testing.assert_array_equal(p, [0.25, -0.25, np.nan, 0.25, -0.25])
    opt.clip_weights = None
    p[0] = 2.0
    opt.step(grads=grads)
    assert p[0] == 2.0


@pytest.mark.parametrize("name", ["cautious_weight_decay", "corrected_weight_decay"])
@pytest.mark.parametrize("make", [RMSprop, TorchRMSprop])
def test_both_are_for_decoupled_decay(name, make):
    params = [np.ones(2)] if make is RMSprop else [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=f"{name}: expected False without decoupled"):
        make(params, **{name: True})
    opt = make(params, **{name: True}, **DECOUPLED)
    opt.param_groups[0]["decoupled_weight_decay"] = False
    if make is TorchRMSprop:
        params[0].grad = torch.ones(2)
    with pytest.raises(ValueError, match=f"{name} of group 0: expected False"):
        opt.step(**({"grads": [np.ones(2)]} if make is RMSprop else {}))
    assert params[0][0] == 1


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_a_limit_is_positive(value):
    with pytest.raises(ValueError, match="clip_weights: expected a number > 0"):
        RMSprop([np.ones(2)], clip_weights=value)
    with pytest.raises(ValueError, match="clip_weights: expected a number > 0"):
        TorchRMSprop([torch.nn.Parameter(torch.ones(2))], clip_weights=value)
    with pytest.raises(TypeError, match="clip_weights: expected a number"):
        RMSprop([np.ones(2)], clip_weights="1")
