"""The averages of parameters in their place, for a while: ``averaged`` of both fronts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rmsprop import _core

if TYPE_CHECKING:
    import numpy as np

    #: A parameter and its average, of one shape and dtype.
    Pair = tuple[np.ndarray, np.ndarray]


@contextmanager
def averaged(
    options: _core.StepOptions, pairs: list[Pair], tensors: list[Any]
) -> Iterator[None]:
    """Exchanges parameters and averages, and again at the end; no step is made in between.

    torch's autograd is told that the ``tensors`` among them were written.

    Raises:
        ValueError: for a parameter that cannot be written; nothing is exchanged then.
    """
    for array, ema in pairs:
        if not array.flags.writeable:
            raise ValueError(
                "averaged: expected writable parameters, got a read-only one"
            )
        if (array.shape, array.dtype) != (ema.shape, ema.dtype):
            raise ValueError(
                f"averaged: expected an ema like its parameter, {array.dtype} of shape"
                f" {array.shape}, got {ema.dtype} of shape {ema.shape}"
            )
    try:
        options._swap_averages(pairs)
        _tell_autograd(tensors)
        yield
    finally:
        if options._is_averaged:
            # The other way round, for tensors may share elements.
            options._swap_averages(pairs[::-1])
            _tell_autograd(tensors)


def _tell_autograd(tensors: list[Any]) -> None:
    if tensors:
        from torch.autograd.graph import increment_version

        increment_version(tensors)
