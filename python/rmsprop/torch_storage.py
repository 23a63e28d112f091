"""How the torch front stores state and 16-bit parameters: new tensors, and those of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmsprop import storage
from rmsprop.state import as_ndarray
from rmsprop.storage import SCALE, At
from rmsprop.torch_names import has_transforms, is_dtensor, is_watched

#: The state that is rounded with random bits, and widened for others.
_AVERAGES = ("square_avg", "grad_avg", "momentum_buffer", "ema")
_COMPLEX = (torch.complex64, torch.complex128)
#: Of tensors that the core steps.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *_COMPLEX)
_NARROW = (torch.float16, torch.bfloat16, torch.uint8)


def is_stepped(p: Tensor) -> bool:
    """Whether the core steps tensors of this kind."""
    is_plain = type(p) in (Tensor, torch.nn.Parameter) or is_dtensor(p)
    is_host = p.device.type == "cpu" and p.layout == torch.strided
    return is_plain and is_host and p.dtype in DTYPES


def dtype_of(stepper: Any, key: str, p: Tensor) -> torch.dtype | None:
    """The type that a parameter's state has; None if it has no such state."""
    if not is_stepped(p) or p.dtype in _COMPLEX:
        return None if key == "error_bits" else p.dtype
    name = stepper.stored_dtype(key, str(p.dtype).removeprefix("torch."), p.numel())
    return None if name is None else getattr(torch, name)


def start(
    p: Tensor, key: str, dtype: torch.dtype, value: float, place: int
) -> dict[str, Tensor]:
    """State at its start value, by key; with its scales, where it is codes."""
    if dtype != torch.uint8:
        return {key: filled_like(p, dtype, value, place)}
    if is_dtensor(p):
        raise ValueError(
            f"state_dtype: expected no uint8 for {key} of a DTensor, whose blocks would"
            " be shared by processes"
        )
    one = storage.narrowed(np.array([value], np.float32), "uint8", At(0, 0, 0, key))
    codes = filled_like(p, dtype, int(one[key][0]), place)
    scale = torch.from_numpy(np.full(-(-p.numel() // storage.BLOCK), value, np.float32))
    return {key: codes, key + SCALE: scale}


def copy_of(
    p: Tensor, dtype: torch.dtype, error_bits: Tensor | None, place: int
) -> Tensor:
    """A tensor like the parameter with its full values."""
    like = filled_like(p, dtype, 0, place)
    if not _is_host_array(p):
        return like.copy_(p.detach())
    errors = None if error_bits is None else error_bits.numpy()
    values = storage.joined(as_ndarray(p), errors)
    if dtype == torch.bfloat16:
        like.copy_(torch.from_numpy(values))
    else:
        _array_of(like)[...] = values
    return like


def filled_like(p: Tensor, dtype: torch.dtype, value: float, place: int) -> Tensor:
    """A tensor like the parameter with one value; complex ones have it in both parts."""
    if not _is_host_array(p):
        of_all: Any = complex(value, value) if torch.is_complex(p) else value
        return torch.full_like(
            p, of_all, dtype=dtype, memory_format=torch.preserve_format
        )
    like = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
    size = like.element_size()
    # Loads wait for stores to the same address modulo a page: state begins elsewhere than the
    # parameter, and than other state. (A large tensor begins 64 bytes into a page, as do gradients.)
    if like.numel() * size >= _PAGE:
        room = torch.empty(like.numel() + _PAGE // size, dtype=dtype, device="cpu")
        start = (p.data_ptr() + 512 * place - room.data_ptr()) % _PAGE
        if start % size == 0:
            storage_ = room.untyped_storage()
            like = torch.empty(0, dtype=dtype, device="cpu").set_(
                storage_, start // size, like.size(), like.stride()
            )
    if dtype == torch.bfloat16:
        value = torch.tensor(value, dtype=dtype).view(torch.int16).item()
    # Not by torch's threads, which a process that was forked would wait for for ever.
    _array_of(like)[...] = value
    return like


def _array_of(tensor: Tensor) -> np.ndarray:
    """A NumPy view; of bfloat16 of the bits."""
    if torch.is_complex(tensor):
        tensor = torch.view_as_real(tensor)
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return bits.numpy()


_PAGE = 4096


def _is_host_array(p: Tensor) -> bool:
    """Whether NumPy can write a tensor like this one."""
    if type(p) not in (Tensor, torch.nn.Parameter):
        return False
    return is_stepped(p) and not is_watched() and not has_transforms()


def tensor_of(value: Any) -> Any:
    """A copy of an array as a tensor; anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    if storage.named(value.dtype) == "bfloat16":
        bits = torch.from_numpy(value.view(np.int16).copy())
        return bits.view(torch.bfloat16)
    return torch.from_numpy(value.copy())


def loaded(
    stepper: Any, p: Tensor, index: int, entry: Any, seed: int
) -> dict[str, Any]:
    """What torch would not load right of a parameter's entry in a checkpoint, as it is stored here.

    torch makes all state of the parameter's type.

    Raises:
        ValueError: for codes without their scales.
    """
    if not isinstance(entry, Mapping) or not is_stepped(p) or is_dtensor(p):
        return {}
    found: dict[str, Any] = {}
    if p.dtype in _COMPLEX or p.dtype == torch.float64:
        return found
    for key, value in entry.items():
        if key == "error_bits" and isinstance(value, Tensor):
            own = dtype_of(stepper, key, p)
            if own is not None:
                name = str(own).removeprefix("torch.")
                bits = storage.error_bits_as(value.numpy(), name)
                found[key] = torch.from_numpy(np.array(bits))
        if key not in _AVERAGES or not isinstance(value, Tensor):
            continue
        dtype = dtype_of(stepper, key, p)
        if value.dtype == dtype == p.dtype or dtype is None:
            continue  # as torch does it
        scale = entry.get(key + SCALE)
        if value.dtype == dtype:
            beside = {} if scale is None else {key + SCALE: scale.clone()}
            found |= {key: value.clone(), **beside}
            continue
        wide = storage.widened(
            as_ndarray(value), key, None if scale is None else as_ndarray(scale)
        )
        step = int(entry.get("step", 0))
        name = str(dtype).removeprefix("torch.")
        at = At(seed, index, step, key)
        new = storage.narrowed(np.asarray(wide, np.float32), name, at)
        found |= {name: tensor_of(array) for name, array in new.items()}
    return found


def needs_loading(p: Tensor, entry: Any) -> bool:
    """Whether torch would load an entry wrong: narrow state, or that of a narrow parameter."""
    if not isinstance(entry, Mapping):
        return False
    values = [value for value in entry.values() if isinstance(value, Tensor)]
    return p.dtype in _NARROW or any(value.dtype in _NARROW for value in values)


def float32_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one parameter as a float32 optimizer has it."""
    arrays = {
        key: as_ndarray(value) if isinstance(value, Tensor) and key != "step" else value
        for key, value in entry.items()
    }
    wide = storage.float32_entry(arrays)
    return {key: tensor_of(value) for key, value in wide.items()}
