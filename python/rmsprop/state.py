"""An optimizer's state as mappings: parameter index -> name -> array or count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from rmsprop import _core


class State(MutableMapping[int, Any]):
    """The state of every parameter, by its index over all groups.

    It is there from the start. Deleting an entry resets it to its start values.
    """

    def __init__(self, optimizer: _core.Optimizer) -> None:
        self._optimizer = optimizer

    def __getitem__(self, index: int) -> ParameterState:
        if index not in range(len(self)):
            raise KeyError(index)
        return ParameterState(self._optimizer, index)

    def __setitem__(self, index: int, entry: Mapping[str, Any]) -> None:
        if index not in range(len(self)):
            raise ValueError(
                f"state: expected the index of a parameter below {len(self)},"
                f" got {index!r}"
            )
        restore(self._optimizer, {index: checked(self._optimizer, index, entry)})

    def __delitem__(self, index: int) -> None:
        if index not in self:
            raise KeyError(index)
        restore(self._optimizer, {index: {}})

    def pop(self, index: int, *default: Any) -> Any:
        """Resets an entry and returns what it was, as a plain dict."""
        if index not in self and default:
            return default[0]
        entry = {key: copied(value) for key, value in self[index].items()}
        del self[index]
        return entry

    def popitem(self) -> tuple[int, Any]:
        """Not offered: every parameter keeps an entry, so it would have no end."""
        raise TypeError("state: expected pop(index), for entries never run out")

    def clear(self) -> None:
        """Resets every entry to its start values."""
        for index in self:
            del self[index]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return self._optimizer._count_parameters()

    def __repr__(self) -> str:
        return repr({index: entry for index, entry in self.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is a copy of the state, not of the optimizer.
        return dict, ({index: dict(entry) for index, entry in self.items()},)


class ParameterState(MutableMapping[str, Any]):
    """The state of one parameter: ``step`` and the arrays ``square_avg``, with
    centered ``grad_avg``, with momentum ``momentum_buffer``, with ema_decay ``ema``, which is
    not there before the first update.

    An array is a view of the optimizer's memory: what is written into it counts at the
    next step. Assigning checks and copies.
    """

    def __init__(self, optimizer: _core.Optimizer, index: int) -> None:
        self._optimizer = optimizer
        self._index = index

    def __getitem__(self, key: str) -> Any:
        if not isinstance(key, str):
            raise KeyError(key)
        if key == "step":
            return self._optimizer._steps(self._index)
        return self._optimizer._state_array(self._index, key)

    def __setitem__(self, key: str, value: Any) -> None:
        entry = checked(self._optimizer, self._index, {key: value})
        self._optimizer._restore([(self._index, entry)])

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._optimizer._restore([(self._index, {key: self._start(key)})])

    def __iter__(self) -> Iterator[str]:
        yield "step"
        yield from self._optimizer._state_keys(self._index)

    def __len__(self) -> int:
        return 1 + len(self._optimizer._state_keys(self._index))

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def pop(self, key: str, *default: Any) -> Any:
        """Resets a value and returns what it was."""
        if key not in self and default:
            return default[0]
        value = copied(self[key])
        del self[key]
        return value

    def popitem(self) -> tuple[str, Any]:
        """Not offered: every key keeps a value, so it would have no end."""
        raise TypeError("state: expected pop(key), for keys never run out")

    def _start(self, key: str, square_avg: float | None = None) -> Any:
        """What a key starts at; None for an average, which starts as its parameter."""
        if key != "square_avg":
            return None if key == "ema" else 0
        if square_avg is not None:
            return square_avg
        group = self._optimizer._group_index(self._index)
        return self._optimizer.param_groups[group]["initial_square_avg"]


def restore(
    optimizer: _core.Optimizer,
    entries: Mapping[int, Mapping[str, Any]],
    options: list[dict[str, Any]] | None = None,
    written: Iterable[tuple[np.ndarray, np.ndarray]] = (),
) -> None:
    """Takes checked entries whole, all at once: what they lack goes back to its start.

    The options are merged into those of the groups before, and the first of each two arrays
    that are ``written`` becomes a copy of the second.
    """
    whole = []
    for index, entry in entries.items():
        group = optimizer._group_index(index)
        start = (options or optimizer.param_groups)[group]["initial_square_avg"]
        keys = ParameterState(optimizer, index)
        starts = {key: keys._start(key, start) for key in keys}
        whole.append((index, {**starts, **entry}))
    optimizer._restore(whole, options, list(written))


def copied(value: Any) -> Any:
    """A value of the state that no longer is the optimizer's memory."""
    return value.copy() if isinstance(value, np.ndarray) else value


def checked(
    optimizer: _core.Optimizer, index: int, entry: Mapping[str, Any]
) -> dict[str, Any]:
    """The entry with its arrays as NumPy's and its step as an int.

    Raises:
        ValueError: if something in it cannot be the state of that parameter.
    """
    if not isinstance(entry, Mapping):
        # Not a TypeError: whatever is wrong with a checkpoint is a ValueError.
        raise ValueError(  # noqa: TRY004
            f"state of parameter {index}: expected a mapping,"
            f" got {type(entry).__name__}"
        )
    result: dict[str, Any] = {}
    for key, value in entry.items():
        if key == "step":
            result[key] = _count(index, value)
        else:
            optimizer._check_state(index, str(key), value)
            result[key] = np.array(as_ndarray(value), copy=True)
            # What was exported a second time must fit as well.
            optimizer._check_state(index, str(key), result[key])
    return result


def _count(index: int, value: Any) -> int:
    """A number of updates, which torch keeps as a float tensor."""
    try:
        number = value if isinstance(value, int) else float(value)
        is_text = isinstance(value, (str, bytes))
        if not is_text and 0 <= number < 2**64 and number == int(number):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(
        f"state step of parameter {index}: expected an integer from 0 to 2**64 - 1,"
        f" got {value!r}"
    )


def as_ndarray(value: Any) -> np.ndarray:
    """A NumPy view of any array that the core accepts."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, _core.Parameter):
        return value.data
    if isinstance(value, np.generic):
        array = np.asarray(value)
        array.flags.writeable = False  # a copy: what is written there would be lost
        return array
    if hasattr(value, "detach"):
        # torch exports no tensor that requires grad, and NumPy before 2.1 takes an
        # exported one for read-only.
        return np.asarray(value.detach().numpy())
    if hasattr(value, "__dlpack__"):
        return np.from_dlpack(value)
    return np.asarray(memoryview(value))
