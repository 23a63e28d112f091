"""Promise: every recorded peer is followed as closely as its own rounding allows.

Each file of `goldens/` is replayed through `rmsprop.RMSprop` with that peer's dialect,
and through the oracle, which proves the rule itself right without the kernel. The table
of dialects here is a second copy on purpose: `rmsprop.dialect` is checked against it.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import rmsprop
from oracle import Oracle

Arrays = list[np.ndarray]
Options = dict[str, Any]
Make = Callable[[Arrays, "Golden"], Any]

DIALECT_KEYS = (
    "alpha",
    "eps",
    "eps_in_sqrt",
    "initial_square_avg",
    "momentum",
    "centered",
    "lr_in_momentum",
    "decoupled_weight_decay",
)
DIALECTS: dict[str, Options] = {
    name: dict(zip(DIALECT_KEYS, values, strict=True))
    for name, values in {
        "oneflow": (0.99, 1e-8, True, 0.0, 0.0, False, True, False),
        "torch": (0.99, 1e-8, False, 0.0, 0.0, False, False, False),
        "timm": (0.9, 1e-10, True, 1.0, 0.0, False, True, False),
        "sb3": (0.99, 1e-8, True, 1.0, 0.0, False, False, False),
        "keras": (0.9, 1e-7, True, 0.0, 0.0, False, True, True),
        "tf1": (0.9, 1e-10, True, 1.0, 0.0, False, True, False),
        "optax": (0.9, 1e-8, True, 0.0, 0.0, False, True, False),
        "paddle": (0.95, 1e-6, True, 0.0, 0.0, False, True, False),
        "mlx": (0.99, 1e-8, False, 0.0, 0.0, False, False, False),
        "graves": (0.95, 1e-4, True, 0.0, 0.9, True, True, False),
        "mindspore": (0.9, 1e-10, True, 1.0, 0.0, False, True, False),
        "chainer": (0.99, 1e-8, False, 0.0, 0.0, False, False, False),
        "burn": (0.99, 1e-5, False, 0.0, 0.9, False, False, False),
        "dfdx": (0.9, 1e-8, True, 1.0, 0.0, False, False, False),
    }.items()
}


class Tolerance(NamedTuple):
    """Allowed deviation of the parameters, in ulp a step; `why` it is not zero."""

    float32: float
    float64: float | None
    why: str


TOLERANCES = {
    "keras": Tolerance(1, None, "(1 - alpha) * (g * g)"),
    "mlx": Tolerance(0.5, None, "(1 - alpha) * (g * g)"),
    "oneflow": Tolerance(1, 1, "(lr * g) * (1 / sqrt(d)), one rounding more"),
    "optax": Tolerance(2, 2, "-lr * (g * rsqrt(d)), XLA's rsqrt being up to 1 ulp off"),
    "paddle": Tolerance(1, 0, "float32: Eigen's sqrt, up to 3 ulp off; float64: none"),
    "sb3": Tolerance(1, 1, "fused multiply-add in ATen, sqrt up to 1 ulp off in MKL"),
    "tf1": Tolerance(0.75, 0.25, "v + (g * g - v) * (1 - alpha)"),
    "timm": Tolerance(1, 1, "the average of tf1 in the arithmetic of torch"),
    "torch": Tolerance(1, 1, "fused multiply-add in ATen, sqrt up to 1 ulp off in MKL"),
}
# Of every recorded state after the last step, in ulp a step: averages forget errors.
STATE_TOLERANCE = 0.5

# A peer's names for options -> ours. Every name a golden file uses is in one of these.
NAMES = {
    "lr": "lr",
    "alpha": "alpha",
    "decay": "alpha",
    "rho": "alpha",
    "eps": "eps",
    "epsilon": "eps",
    "eps_in_sqrt": "eps_in_sqrt",
    "weight_decay": "weight_decay",
    "decoupled_decay": "decoupled_weight_decay",
    "momentum": "momentum",
    "nesterov": "nesterov",
    "lr_in_momentum": "lr_in_momentum",
    "centered": "centered",
    "initial_ms": "initial_square_avg",
    "initial_scale": "initial_square_avg",
    "bias_correction": "bias_correction",
    "maximize": "maximize",
    "global_clipnorm": "max_grad_norm",
    "ms": "square_avg",
    "mg": "grad_avg",
    "mom": "momentum_buffer",
    "square_avg": "square_avg",
    "grad_avg": "grad_avg",
    "momentum_buffer": "momentum_buffer",
}
CLIPPING = {"clipnorm", "clipvalue", "clip_grad_max_norm", "clip_grad_norm_type"}
ABOUT = {"peer", "version", "dtype"}

# Hyperparameters that a peer rounds to float32 before it combines them, so that the
# rounded ones are the ones to hand over. TensorFlow's op has only float32 ones with
# float32 parameters, which matters to 1 - alpha.
ROUNDED = {
    ("oneflow", "float32"): ("lr", "alpha", "eps", "weight_decay"),
    ("oneflow", "float64"): ("lr", "alpha", "eps", "weight_decay"),
    ("paddle", "float32"): ("alpha", "eps", "momentum"),
    ("paddle", "float64"): ("alpha", "eps", "momentum"),
    ("tf1", "float32"): ("alpha",),
}

# Centered with bias correction, the first variance is zero: what these peers did in the
# first step is their rounding noise over sqrt(eps), NaN where the noise was negative.
NOISY_START = ("optax_17", "optax_18")

GOLDENS = Path(__file__).with_name("goldens")
FILES = sorted(path.stem for path in GOLDENS.glob("*.npz"))


class Golden:
    """One recorded trajectory; the elements of all parameters make one flat row."""

    def __init__(self, name: str) -> None:
        self._file = np.load(GOLDENS / f"{name}.npz")
        self.config: Options = json.loads(str(self._file["config"]))
        self.peer: str = self.config["peer"]
        self.dtype: str = self.config["dtype"]
        self.steps = sum(re.fullmatch(r"g\d+_0", key) is not None for key in self._file)
        self.params = np.stack([flat(self[f"p{t}"]) for t in range(self.steps + 1)])
        keys = {k.rsplit("_", 1)[0] for k in self._file if k.startswith("state_")}
        if not self.config.get("momentum"):
            keys.discard("state_mom")  # TensorFlow keeps a buffer without momentum, too
        self.state = {
            NAMES[key.removeprefix("state_")]: flat(self[key]) for key in keys
        }

    def __getitem__(self, key: str) -> Arrays:
        return [self._file[f"{key}_{i}"] for i in range(4)]

    def grads(self, step: int) -> Arrays:
        return clipped(self[f"g{step}"], self.config)

    def overrides(self) -> Options:
        """Translate the recorded configuration into our keyword arguments."""
        options = {
            NAMES[key]: value
            for key, value in self.config.items()
            if key not in ABOUT | CLIPPING
        }
        for key in ROUNDED.get((self.peer, self.dtype), ()):
            options[key] = float(np.float32(options[key]))
        return options


def clipped(grads: Arrays, config: Options) -> Arrays:
    """Clip the gradients as the peer does before its own update."""
    T = grads[0].dtype.type
    if limit := config.get("clip_grad_max_norm"):
        kind = float(config["clip_grad_norm_type"])
        norm = np.linalg.norm([np.linalg.norm(np.ravel(g), kind) for g in grads], kind)
        return [g * min(T(1), T(limit) / (norm + T(1e-6))) for g in grads]
    if limit := config.get("clipnorm"):
        return [g * T(limit) / max(T(limit), np.linalg.norm(g)) for g in grads]
    if limit := config.get("clipvalue"):
        return [np.clip(g, T(-limit), T(limit)) for g in grads]
    return grads


def flat(arrays: Arrays) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in arrays])


def oracle(params: Arrays, golden: Golden) -> Oracle:
    return Oracle(params, **DIALECTS[golden.peer] | golden.overrides())


def package(params: Arrays, golden: Golden) -> rmsprop.RMSprop:
    options = rmsprop.dialect(golden.peer, **golden.overrides())
    return rmsprop.RMSprop(params, **options)


both = pytest.mark.parametrize("make", [oracle, package])


def replay(
    make: Make, golden: Golden, adopt_first_step: bool = False
) -> dict[str, np.ndarray]:
    """Replay a file; return the parameters `p` and every state, a row for each step.

    With `adopt_first_step` the recorded first step replaces ours: the parameters, and
    the buffer that is their difference. The returned row is ours all the same.
    """
    params = golden["p0"]
    opt = make(params, golden)
    rows: dict[str, list[np.ndarray]] = defaultdict(list)
    for t in range(golden.steps):
        opt.step(grads=golden.grads(t))
        rows["p"].append(flat(params))
        for key in set(opt.state[0]) - {"step"}:
            rows[key].append(flat([opt.state[i][key] for i in range(len(params))]))
        if adopt_first_step and t == 0:
            for i, after in enumerate(golden["p1"]):
                params[i][...] = after
                opt.state[i]["momentum_buffer"][...] = golden["p0"][i] - after
    return {key: np.stack(value) for key, value in rows.items()}


def deviation(p: np.ndarray, golden: Golden) -> np.ndarray:
    """Return how far `p` is from the recorded parameters, in ulp a step.

    That is the difference after `t` steps, over `t` ulp of the largest magnitude that
    the element has had so far.
    """
    ulp = np.spacing(np.maximum.accumulate(np.abs(golden.params)))[1:]
    steps = np.arange(1, golden.steps + 1)[:, None]
    return np.abs(p - golden.params[1:]) / (ulp * steps)


@both
@pytest.mark.parametrize("name", [name for name in FILES if name not in NOISY_START])
def test_every_step_follows_the_peer(make: Make, name: str) -> None:
    golden = Golden(name)
    rows = replay(make, golden)
    tolerance = getattr(TOLERANCES[golden.peer], golden.dtype)
    assert np.max(deviation(rows["p"], golden)) <= tolerance
    for key, recorded in golden.state.items():
        ulp = np.spacing(np.max(np.abs(rows[key]), axis=0))
        ulps = np.max(np.abs(rows[key][-1] - recorded) / ulp)
        assert ulps / golden.steps <= STATE_TOLERANCE, key


@both
@pytest.mark.parametrize("name", NOISY_START)
def test_steps_follow_the_peer_after_a_noisy_start(make: Make, name: str) -> None:
    """Well-conditioned elements are compared: those with two digits in the variance.

    The condition of the variance, `c * v / (d + eps)`, says how many ulp its rounding
    errors become, so the tolerance grows with it. In the first step few elements of
    float32 are well-conditioned, and all of float64; from the second on, once that step
    is taken as recorded, all are whose record is not NaN.
    """
    golden = Golden(name)
    options = golden.overrides()
    rows = replay(make, golden, adopt_first_step=True)

    t = np.arange(1, golden.steps + 1)
    c = 1 / (1 - options["alpha"] ** t[:, None])
    mean_square, mean = c * rows["square_avg"], c * rows["grad_avg"]
    variance = np.maximum(mean_square - mean**2, 0) + options["eps"]
    condition = np.maximum(mean_square / variance, 1)
    condition[1:] = np.maximum.accumulate(condition[1:])

    assert np.isfinite(rows["p"][0]).all()
    comparable = condition * np.finfo(golden.dtype).eps < 0.01
    comparable[1:] &= np.isfinite(golden.params[1])
    worst = deviation(rows["p"], golden) / condition
    assert np.mean(comparable[0]) > (0.1 if golden.dtype == "float32" else 0.99)
    assert np.mean(comparable[1:]) > 0.9
    assert np.max(worst[comparable]) <= getattr(TOLERANCES[golden.peer], golden.dtype)


@pytest.mark.parametrize("name", ["oneflow_05", "oneflow_06"])
def test_clip_grad_is_oneflows(name: str) -> None:
    golden = Golden(name)
    params = [rmsprop.Parameter(p) for p in golden["p0"]]
    group = {
        "params": params,
        "clip_grad_max_norm": golden.config["clip_grad_max_norm"],
        "clip_grad_norm_type": float(golden.config["clip_grad_norm_type"]),
    }
    opt = package([group], golden)
    rows = []
    for t in range(golden.steps):
        for p, g in zip(params, golden[f"g{t}"], strict=True):
            p.grad = g
        opt.clip_grad()
        opt.step()
        rows.append(flat([p.data for p in params]))
    assert np.max(deviation(np.stack(rows), golden)) <= TOLERANCES["oneflow"].float32


def test_every_peer_is_recorded() -> None:
    assert {Golden(name).peer for name in FILES} == set(TOLERANCES)


@pytest.mark.parametrize("name", DIALECTS)
def test_dialect_spells_out_its_row(name: str) -> None:
    options = rmsprop.dialect(name)
    assert {key: options[key] for key in DIALECT_KEYS} == DIALECTS[name]
    assert not any(options[key] for key in options.keys() - DIALECT_KEYS)
    assert "lr" not in options
    rmsprop.RMSprop([np.zeros(3)], **options)


def test_dialect_takes_overrides() -> None:
    base = rmsprop.dialect("tf1")
    changed = {"lr": 7e-4, "momentum": 0.9, "weight_decay": 1e-5}
    assert rmsprop.dialect("tf1", **changed) == base | changed
    assert rmsprop.dialect("tf1") == base


def test_dialect_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="tensorflow"):
        rmsprop.dialect("tensorflow")
    with pytest.raises(TypeError, match="rho"):
        rmsprop.dialect("keras", rho=0.9)
