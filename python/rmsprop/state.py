"""An optimizer's state as mappings: parameter index -> name -> array or count."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from rmsprop import _core, storage
from rmsprop.storage import NARROW, SCALE, At


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
    not there before the first update, with master_weight_bits ``error_bits``. With
    state_dtype they have that type: codes are uint8, and ``square_avg_scale`` has their scales.

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
        self._optimizer._restore([(self._index, self._start(key.removesuffix(SCALE)))])

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

    def _start(self, key: str, square_avg: float | None = None) -> dict[str, Any]:
        """What a key starts at, as it is stored; None for an average, which starts as its parameter."""
        if key == "ema":
            return {key: None}
        if key != "square_avg":
            value: float = 0
        elif square_avg is not None:
            value = square_avg
        else:
            group = self._optimizer._group_index(self._index)
            value = self._optimizer.param_groups[group]["initial_square_avg"]
        dtype = "" if key == "step" else self._optimizer._stored_dtype(self._index, key)
        at = At(0, self._index, 0, key)
        return (
            dict(storage.narrowed(np.array([value]), dtype, at))
            if dtype in NARROW
            else {key: value}
        )


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
        complete = dict(entry)
        for key in (key for key in keys if not key.endswith(SCALE)):
            complete = {**keys._start(key, start), **complete}
        whole.append((index, complete))
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
    if "step" in entry:
        result["step"] = _count(index, entry["step"])
    step = result.get("step", optimizer._steps(index))
    for key, value in entry.items():
        key = str(key)
        if key != "step" and key.removesuffix(SCALE) not in (key, *entry):
            result[key] = _checked_scale(optimizer, index, key, value)
        elif key != "step" and not (key.endswith(SCALE)):
            scale = entry.get(key + SCALE)
            result.update(_checked_array(optimizer, index, key, value, scale, step))
    return result


def _checked_array(
    optimizer: _core.Optimizer, index: int, key: str, value: Any, scale: Any, step: int
) -> dict[str, Any]:
    """An array of state, and its scales, in the storage of the optimizer."""
    try:
        own = optimizer._stored_dtype(index, key)
    except KeyError:
        if key == "error_bits":
            return {}  # of a parameter that has none here
        own = ""
    name = storage.named(getattr(value, "dtype", ""))
    narrow = None
    if key == "error_bits" and name in ("int8", "int16"):
        value = storage.error_bits_as(as_ndarray(value), own)
    elif name in NARROW and own in ("float32", *NARROW):
        narrow = np.array(as_ndarray(value), copy=True)
        scale = None if scale is None else np.array(as_ndarray(scale), copy=True)
        try:
            value = storage.widened(narrow, key, scale)
        except ValueError as error:
            raise ValueError(f"state of parameter {index}: {error}") from None
    wanted = "float32" if own in NARROW else own
    optimizer._check_state(index, key, value, wanted)
    array = np.array(as_ndarray(value), copy=True)
    # What was exported a second time must fit as well.
    optimizer._check_state(index, key, array, wanted)
    if narrow is not None and name == own:
        return {key: narrow} if scale is None else {key: narrow, key + SCALE: scale}
    return dict(storage.narrowed(array, own, At(optimizer.seed, index, step, key)))


def _checked_scale(
    optimizer: _core.Optimizer, index: int, key: str, value: Any
) -> np.ndarray:
    """Scales of codes that stay as they are."""
    is_there = key in optimizer._state_keys(index)
    wanted = optimizer._state_array(index, key) if is_there else None
    found = np.array(as_ndarray(value), copy=True)
    if wanted is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        want = "no such key" if wanted is None else f"float32 of shape {wanted.shape}"
        raise ValueError(
            f"state {key} of parameter {index}: expected {want}, got {found.dtype} of shape"
            f" {found.shape}"
        )
    return found


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
        if str(value.dtype) == "torch.bfloat16":  # no type of NumPy's own
            bits = value.detach().view(sys.modules["torch"].uint16)
            return storage.as_bfloat16(bits.numpy())
        # torch exports no tensor that requires grad, and NumPy before 2.1 takes an
        # exported one for read-only.
        return np.asarray(value.detach().numpy())
    if hasattr(value, "__dlpack__"):
        return np.from_dlpack(value)
    return np.asarray(memoryview(value))
