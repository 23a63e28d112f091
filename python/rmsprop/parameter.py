"""A NumPy array with a place for its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from rmsprop import _core


class Parameter(_core.Parameter, NDArrayOperatorsMixin):
    """A NumPy array that is trained: ``data``, its gradient ``grad``, and a ``name``.

    It stands for its array in NumPy's operators and functions, so that a training
    loop reads as in any framework. The array is shared, not copied.

    Args:
        data: an array of float32 or float64, or what ``numpy.asarray`` makes one of.
        name: what messages, and gradients that are given by name, call it.

    Raises:
        TypeError: for any other dtype.

    Example:
        >>> w = Parameter(np.ones((2, 3)), name="w")
        >>> w.grad = np.ones_like(w.data)
        >>> (np.ones(2) @ w).tolist()
        [2.0, 2.0, 2.0]
    """

    # A base class with operators of its own leaves no room for a hash; this one is by
    # identity, as an object that changes must have it.
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is None:
            return np.asarray(self.data, dtype)
        return np.array(self.data, dtype, copy=copy)

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any
    ) -> Any:
        def array(x: Any) -> Any:
            return x.data if isinstance(x, Parameter) else x

        out = kwargs.get("out", ())
        if out:
            kwargs["out"] = tuple(array(x) for x in out)
        result = getattr(ufunc, method)(*map(array, inputs), **kwargs)
        # `w -= x` must leave w the Parameter that it was.
        if not out or result is NotImplemented:
            return result
        return out[0] if len(out) == 1 else out

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.data.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.data.__dlpack_device__()

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The array's dtype."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """The array's number of dimensions."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """The array's number of elements."""
        return self.data.size

    def __getattr__(self, name: str) -> Any:
        # `w.T`, `w.sum()` and so on; never a protocol of the array's own class.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        return iter(self.data)

    def __contains__(self, item: Any) -> bool:
        return item in self.data

    def __int__(self) -> int:
        return int(self.data)

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.data.item(), digits)

    def __format__(self, spec: str) -> str:
        return format(self.data, spec) if spec else str(self)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __float__(self) -> float:
        return float(self.data)

    def __getitem__(self, index: Any) -> Any:
        return self.data[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.data[index] = value

    def __getnewargs__(self) -> tuple[np.ndarray, str | None]:
        return self.data, self.name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "grad": self.grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)

    def __repr__(self) -> str:
        name = "" if self.name is None else f", name={self.name!r}"
        return f"Parameter({self.data!r}{name})"
