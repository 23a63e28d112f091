"""The averages of parameters in their place, for a while: ``averaged`` of both fronts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rmsprop import _core
from rmsprop.storage import rounded_like, widened

if TYPE_CHECKING:
    import numpy as np

    #: A parameter and its average, of one shape.
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
        is_alike = array.dtype == ema.dtype or array.dtype.itemsize == 2
        if array.shape != ema.shape or not is_alike:
            raise ValueError(
                f"averaged: expected an ema like its parameter, {array.dtype} of shape"
                f" {array.shape}, got {ema.dtype} of shape {ema.shape}"
            )
    narrow = [(array, ema) for array, ema in pairs if array.dtype != ema.dtype]
    alike = [(array, ema) for array, ema in pairs if array.dtype == ema.dtype]
    aside: list[Any] = []
    try:
        # Of 16-bit parameters the average is not one that could change places with it.
        aside += [array.copy() for array, _ in narrow]
        rounded = [rounded_like(array, widened(ema, "ema")) for array, ema in narrow]
        options._swap_averages(alike)
        for (array, _), values in zip(narrow, rounded):
            array[...] = values
        _tell_autograd(tensors)
        yield
    finally:
        if options._is_averaged:
            # The other way round, for tensors may share elements.
            options._swap_averages(alike[::-1])
            for (array, _), values in zip(narrow, aside):
                array[...] = values
            _tell_autograd(tensors)


def _tell_autograd(tensors: list[Any]) -> None:
    if tensors:
        from torch.autograd.graph import increment_version

        increment_version(tensors)
