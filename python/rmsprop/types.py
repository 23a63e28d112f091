"""The types of arguments, for type checkers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, TypedDict

#: The names that :func:`rmsprop.dialect` knows.
Dialect: TypeAlias = Literal[
    "oneflow",
    "torch",
    "timm",
    "sb3",
    "keras",
    "tf1",
    "optax",
    "paddle",
    "mlx",
    "graves",
    "mindspore",
    "chainer",
    "burn",
    "dfdx",
    "dqn",
]

#: What becomes of a step with an infinite or NaN gradient.
Nonfinite: TypeAlias = Literal["propagate", "skip", "raise"]


#: How parameters of 16 bits are rounded.
Rounding: TypeAlias = Literal["nearest", "stochastic"]

#: The types of state: one for all, or by key.
StateDType: TypeAlias = (
    Literal["float32", "bfloat16", "uint8"]
    | Mapping[str, Literal["float32", "bfloat16", "uint8"]]
    | None
)


class DialectOptions(TypedDict):
    """A whole formula: what :func:`rmsprop.dialect` returns, for both fronts."""

    alpha: float
    eps: float
    weight_decay: float
    momentum: float
    centered: bool
    eps_in_sqrt: bool
    initial_square_avg: float
    lr_in_momentum: bool
    nesterov: bool
    bias_correction: bool
    decoupled_weight_decay: bool


class Overrides(TypedDict, total=False):
    """What :func:`rmsprop.dialect` takes besides a name."""

    alpha: float
    eps: float
    weight_decay: float
    momentum: float
    centered: bool
    eps_in_sqrt: bool
    initial_square_avg: float
    lr_in_momentum: bool
    nesterov: bool
    bias_correction: bool
    decoupled_weight_decay: bool
    lr: float
    maximize: bool
    cautious_weight_decay: bool
    corrected_weight_decay: bool
    clip_weights: float | None
    ema_decay: float | None
    max_grad_norm: float | None
    nonfinite: Nonfinite
    contiguous_params: bool
    threads: int | None
    state_dtype: StateDType
    rounding: Rounding
    master_weight_bits: Literal[24, 32] | None
    seed: int
    capturable: bool
    foreach: bool | None
    differentiable: bool


#: Arrays, pairs of name and array, or groups; or a mapping by name, or one group. (Of what kind the
#: arrays are is not said: a list of arrays of two dtypes would be a list of objects to mypy.)
Params: TypeAlias = Iterable[Any] | Mapping[str, Any]

#: Arrays, floats for parameters without dimensions, None for those that have none.
Gradients: TypeAlias = Iterable[Any] | Mapping[str, Any]
