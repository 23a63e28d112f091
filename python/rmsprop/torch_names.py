"""Torch's private names, in one place, each with what stands for it where a torch lacks it.

:mod:`rmsprop.torch` and its parts, and the core, take them from here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim import optimizer  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils import _python_dispatch

_FILES = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib"}
_file = _FILES.get(sys.platform, "torch_cpu.dll")
_library = Path(torch.__file__).parent / "lib" / _file

#: The library whose stable C functions tell where tensors are and lend torch's threads. A loaded
#: one is found by its name alone. Without the functions tensors are asked one by one, and steps use
#: threads of our own.
LIBRARY = str(_library) if _library.is_file() else _file

#: Tells autograd that tensors were written in place. The public function does the same, slower.
increment_version: Any = getattr(
    torch._C, "_increment_version", torch.autograd.graph.increment_version
)


def _probes() -> tuple[list[tuple[Tensor, int]], ...]:
    shapes = [(2,) * ndim for ndim in range(6)] * 4
    plain = [torch.zeros(shape) for shape in shapes]
    number = [torch.zeros(shape, dtype=torch.complex64) for shape in shapes]
    conjugated = [z.conj() for z in number]
    kinds = (plain + number, [z.imag for z in conjugated], conjugated)
    return tuple([(x, x._cdata) for x in kind] for kind in kinds)


#: Plain, negated and conjugated tensors and where they are, for the core to learn how to read them
#: and to tell them apart. Without the name every tensor goes through :mod:`rmsprop.fallback`.
PROBES: Any = _probes() if hasattr(Tensor, "_cdata") else ([], [], [])

# The hooks of all optimizers, and whether the profiler wants a range around a step. Without the
# names every step goes through torch's own wrapper, which knows.
_MISSING = {None: None}
_pre_hooks = getattr(optimizer, "_global_optimizer_pre_hooks", _MISSING)
_post_hooks = getattr(optimizer, "_global_optimizer_post_hooks", _MISSING)
_profiler: Any = profiler
if not hasattr(profiler, "_is_profiler_enabled"):
    _profiler = SimpleNamespace(_is_profiler_enabled=True)
# Whether any TorchDispatchMode is on: without the name, `is_watched` is asked instead.
_modes: Any = _python_dispatch
if not hasattr(_python_dispatch, "_is_in_torch_dispatch_mode"):
    _modes = SimpleNamespace(_is_in_torch_dispatch_mode=True)


def wants_wrapper() -> bool:
    """Whether torch's own wrapper must be around a step."""
    return bool(
        _pre_hooks
        or _post_hooks
        or _profiler._is_profiler_enabled
        or _modes._is_in_torch_dispatch_mode
    )


def is_watched() -> bool:
    """Whether a TorchDispatchMode is on: tracers and counters see torch's operations only."""
    count = getattr(torch._C, "_len_torch_dispatch_stack", None)
    return count is not None and count() > 0


def has_transforms() -> bool:
    """Whether a transform of functorch is on; without the name none is taken to be."""
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    return ask is not None and ask()


def check_capture(opt: Any) -> None:
    """Torch's own check before a step of tensors on an accelerator; left out where it is missing."""
    check = getattr(opt, "_accelerator_graph_capture_health_check", None)
    if check is not None:
        check()


def skip_compiling(function: Any, reason: str) -> None:
    """Lets Dynamo break the graph at a function; without the names it would trace into it."""
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = reason


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: importing its module takes long, and without it none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def shard(tensor: Any) -> Any:
    """Returns this process's shard of a DTensor. (``to_local`` would make autograd watch.)"""
    local = getattr(tensor, "_local_tensor", None)
    if local is None:
        local = tensor.to_local().detach()
    # The result of a collective may still be under way.
    return local.wait() if hasattr(local, "wait") else local


def increment_all(tensors: Iterable[Tensor]) -> None:
    """As `increment_version`, of any iterable."""
    increment_version(list(tensors))
