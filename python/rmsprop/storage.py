"""How state and 16-bit parameters are stored: what becomes of arrays of other storage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rmsprop import _core

if TYPE_CHECKING:
    from rmsprop.types import Rounding, StateDType

#: What follows the key of codes in the name of their scales.
SCALE = "_scale"
#: The types of state that are narrower than what is computed with.
NARROW = ("bfloat16", "uint8")
#: Elements of one parameter that share a scale.
BLOCK = 256


class Storage(NamedTuple):
    """The options of an optimizer that say how numbers are stored; in no checkpoint."""

    state_dtype: StateDType = None
    rounding: Rounding = "nearest"
    master_weight_bits: int | None = None
    seed: int = 0


class HasStorage:
    """What both fronts say of these options."""

    _storage = Storage()

    def _keep_storage(self, storage: Storage) -> None:
        """Keeps options that were found right, and no mapping of the caller's."""
        if isinstance(storage.state_dtype, Mapping):
            storage = storage._replace(state_dtype=dict(storage.state_dtype))
        self._storage = storage

    @property
    def state_dtype(self) -> StateDType:
        """The type of the state, as it was given."""
        return self._storage.state_dtype

    @property
    def rounding(self) -> Rounding:
        """How parameters of 16 bits are rounded."""
        return self._storage.rounding

    @property
    def master_weight_bits(self) -> int | None:
        """How many bits of bfloat16 parameters are kept, error bits included."""
        return self._storage.master_weight_bits

    def _unusual_storage(self) -> list[str]:
        """The names of those that are not as they are by default."""
        both = zip(self._storage, Storage(), Storage._fields)
        return [name for value, usual, name in both if value != usual]


class At(NamedTuple):
    """Where the random bits come from with which an array of state is rounded."""

    seed: int
    parameter: int
    step: int
    key: str


def named(dtype: Any) -> str:
    """NumPy's name of a dtype; "bfloat16" also of its bits."""
    name = str(dtype).removeprefix("torch.")
    return "bfloat16" if name == "uint16" else name


def widened(array: np.ndarray, key: str, scale: np.ndarray | None = None) -> np.ndarray:
    """The numbers that an array of state stands for, in float32 where it is narrower.

    Raises:
        ValueError: for codes without their scales.
    """
    name = named(array.dtype)
    if name == "bfloat16":
        bits = np.ascontiguousarray(array).view(np.uint16).astype(np.uint32)
        return (bits << 16).view(np.float32)
    if name != "uint8":
        return array
    wanted = (-(-array.size // BLOCK),)
    if scale is None or scale.shape != wanted or scale.dtype != np.float32:
        got = "none" if scale is None else f"{scale.dtype} of shape {scale.shape}"
        raise ValueError(
            f"{key}{SCALE}: expected float32 of shape {wanted} beside codes of shape"
            f" {array.shape}, got {got}"
        )
    codes = np.ascontiguousarray(array).ravel()
    values = _core.decode_uint8(codes, np.ascontiguousarray(scale), key)
    return values.reshape(array.shape)


def narrowed(values: np.ndarray, dtype: str, at: At) -> dict[str, np.ndarray]:
    """Arrays of state for these numbers, by their keys, rounded as a step does."""
    if dtype not in NARROW:
        return {at.key: values}
    flat = np.ascontiguousarray(values, np.float32).ravel()
    if dtype == "bfloat16":
        bits = _core.encode_bfloat16(flat, at).reshape(values.shape)
        return {at.key: as_bfloat16(bits)}
    codes, scale = _core.encode_uint8(flat, at)
    return {at.key: codes.reshape(values.shape), at.key + SCALE: scale}


def as_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Bits as ``ml_dtypes.bfloat16``, where that is installed."""
    try:
        import ml_dtypes
    except ImportError:
        return bits
    return bits.view(ml_dtypes.bfloat16)


def rounded_like(array: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Numbers in the type of an array of 16 bits, to nearest."""
    if named(array.dtype) != "bfloat16":
        return values.astype(array.dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = bits + 0x7FFF + (bits >> 16 & 1)
    nearest = np.where(np.isnan(values), bits | 0x400000, nearest) >> 16
    return nearest.astype(np.uint16).view(array.dtype)


def error_bits_as(array: np.ndarray, dtype: str) -> np.ndarray:
    """Error bits of 24 or 32 master bits as those of the other."""
    if array.dtype == dtype:
        return array
    if array.dtype == np.int8:
        return array.astype(np.int16) << 8
    return (array >> 8).astype(np.int8)


def joined(param: np.ndarray, error_bits: np.ndarray | None) -> np.ndarray:
    """The full values of a parameter, a copy, in float32 where it is narrower."""
    if error_bits is not None:
        bits = np.ascontiguousarray(param).view(np.uint16).ravel()
        error_bits = np.ascontiguousarray(error_bits_as(error_bits, "int16"))
        return _core.join_error_bits(bits, error_bits.ravel()).reshape(param.shape)
    if param.dtype == np.float16:
        return param.astype(np.float32)
    return np.array(widened(param, "param"))


def float32_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one parameter as a float32 optimizer has it; arrays are copies."""
    wide: dict[str, Any] = {}
    for key, value in entry.items():
        is_beside = key.endswith(SCALE) and key.removesuffix(SCALE) in entry
        if is_beside or key == "error_bits":
            continue
        if isinstance(value, np.ndarray):
            value = np.array(widened(value, key, entry.get(key + SCALE)))
        wide[key] = value
    return wide
