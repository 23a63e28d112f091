"""The update rule once more, in NumPy: what the fused kernel must equal bit for bit.

Written from the rule's definition, not from the kernel. Each line of the rule is one
line here and each NumPy operation one rounding in the type of the parameter; the
hyperparameters are combined in float64 and rounded once. The symbols are the rule's:

    p parameter, g gradient, v square_avg, m grad_avg, b momentum_buffer, e ema
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

State = dict[str, Any]


@dataclass
class Options:
    """The arguments of `rmsprop.RMSprop` that change numbers, with its defaults."""

    lr: float = 1e-3
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    eps_in_sqrt: bool = True
    initial_square_avg: float = 0.0
    lr_in_momentum: bool = True
    nesterov: bool = False
    bias_correction: bool = False
    decoupled_weight_decay: bool = False
    cautious_weight_decay: bool = False
    corrected_weight_decay: bool = False
    clip_weights: float | None = None
    ema_decay: float | None = None
    maximize: bool = False
    max_grad_norm: float | None = None
    initial_lr: float | None = None  # a key of the group


class Oracle:
    """`rmsprop.RMSprop` for one group of arrays, as far as numbers go."""

    def __init__(self, params: Iterable[np.ndarray], **options: Any) -> None:
        self.params = list(params)
        self.options = Options(**options)
        self.state = {
            i: initial_state(p, self.options) for i, p in enumerate(self.params)
        }
        self.last_grad_norm: float | None = None

    def step(
        self, grads: Sequence[np.ndarray | None], grad_norm: float | None = None
    ) -> None:
        """Update the parameters in place; None skips one.

        `grad_norm` replaces the exact norm under `max_grad_norm`: a norm summed in
        another order may differ in its last bits, and the update then follows it.
        """
        factor = 1.0
        if self.options.max_grad_norm is not None:
            norm = global_norm(grads) if grad_norm is None else grad_norm
            self.last_grad_norm = norm
            factor = clipping_factor(norm, self.options.max_grad_norm)
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is not None:
                update(p, g, self.state[i], self.options, factor)
        if self.options.corrected_weight_decay and self.options.initial_lr is None:
            self.options.initial_lr = self.options.lr


def initial_state(p: np.ndarray, o: Options) -> State:
    """Return the state of a parameter before its first step."""
    state: State = {"step": 0, "square_avg": np.full_like(p, o.initial_square_avg)}
    if o.centered:
        state["grad_avg"] = np.zeros_like(p)
    if o.momentum > 0:
        state["momentum_buffer"] = np.zeros_like(p)
    return state


@np.errstate(all="ignore")
def update(
    p: np.ndarray, g: np.ndarray, state: State, o: Options, factor: float = 1.0
) -> None:
    """Apply one step to one parameter and its state, in place."""
    T = p.dtype.type
    state["step"] += 1
    if o.ema_decay is not None and "ema" not in state:
        state["ema"] = p.copy()
    t = state["step"]

    grad_scale = T(-factor if o.maximize else factor)
    lr, alpha, eps, momentum = T(o.lr), T(o.alpha), T(o.eps), T(o.momentum)
    one_minus_alpha = T(1.0 - o.alpha)
    lr_in, lr_out = (lr, T(1)) if o.lr_in_momentum else (T(1), lr)
    eps_in, eps_out = (eps, T(0)) if o.eps_in_sqrt else (T(0), eps)
    c = T(1.0 / (1.0 - power(o.alpha, t))) if o.bias_correction else T(1)

    if grad_scale != 1:
        g = grad_scale * g
    decaying_lr = o.lr
    initial_lr = o.lr if o.initial_lr is None else o.initial_lr
    if o.corrected_weight_decay and initial_lr != 0:
        decaying_lr = o.lr * o.lr / initial_lr
    decay = T(decaying_lr * o.weight_decay)
    is_cautious = o.weight_decay > 0 and o.cautious_weight_decay
    if o.weight_decay > 0 and o.decoupled_weight_decay:
        if not is_cautious:
            p[...] = p - decay * p
    elif o.weight_decay > 0:
        g = g + T(o.weight_decay) * p

    v = state["square_avg"]
    v[...] = alpha * v + (one_minus_alpha * g) * g
    d = c * v
    if o.centered:
        m = state["grad_avg"]
        m[...] = alpha * m + one_minus_alpha * g
        d = d - np.square(c * m)
        d = np.where(d < 0, T(0), d)
    s = np.sqrt(d + eps_in) + eps_out

    if not o.momentum > 0:
        u = (lr * g) / s
    else:
        scaled = (lr_in * g) / s
        b = state["momentum_buffer"]
        b[...] = momentum * b + scaled
        u = lr_out * (scaled + momentum * b) if o.nesterov else lr_out * b
    if is_cautious:
        # A zero has either sign, a NaN none.
        is_alike = (u >= 0) & (p >= 0) | (u <= 0) & (p <= 0)
        p[...] = np.where(is_alike, p - decay * p, p)
    p[...] = p - u
    if o.clip_weights is not None:
        limit = T(o.clip_weights)
        p[...] = np.clip(p, -limit, limit)
    if o.ema_decay is not None:
        e = state["ema"]
        e[...] = T(o.ema_decay) * e + T(1.0 - o.ema_decay) * p


def power(a: float, t: int) -> float:
    """Return a to the t by repeated squaring: the C library's `pow` may differ."""
    r = 1.0
    while t > 0:
        if t & 1:
            r *= a
        a *= a
        t >>= 1
    return r


def global_norm(grads: Iterable[np.ndarray | None]) -> float:
    """Return the L2 norm over all gradients, squared in float64 and summed exactly."""
    squares = [np.square(g, dtype=np.float64) for g in grads if g is not None]
    flat = np.concatenate([np.zeros(1), *(s.ravel() for s in squares)])
    total = float(flat.sum())
    return math.sqrt(math.fsum(flat)) if math.isfinite(total) else math.sqrt(total)


def clipping_factor(norm: float, max_norm: float) -> float:
    """Return the factor that brings gradients of that norm down to `max_norm`."""
    return float(np.minimum(1.0, max_norm / (norm + 1e-6)))
