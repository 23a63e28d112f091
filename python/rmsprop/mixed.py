"""A step of :mod:`rmsprop.torch` in which something is not ordinary.

New state, DTensors, gradients with a pending sign, and tensors that only torch's own
``rmsprop`` takes. Here Python looks at each tensor; the arithmetic is the core's, or torch's.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.rmsprop import rmsprop as torch_rmsprop

from rmsprop import _core

if TYPE_CHECKING:
    from rmsprop.torch import RMSprop

Group: TypeAlias = dict[str, Any]
#: A group's place in ``opt.param_groups`` and a parameter's place in the group.
Place: TypeAlias = tuple[int, int]
#: index, p, g, v, m, b, step: what the core is given. None for state that is not used.
Row: TypeAlias = tuple[Any, ...]


@dataclass
class Item:
    """A parameter that has a gradient."""

    index: int
    p: Tensor
    grad: Tensor
    #: Its state, with what the options newly need.
    entry: Group
    #: None if the core does not take it.
    row: Row | None = None


@dataclass
class Part:
    """A parameter group in a step."""

    group: Group
    items: list[Item]
    #: State that is not in ``opt.state`` yet.
    new: dict[Tensor, Group]

    @property
    def rows(self) -> list[Row]:
        return [item.row for item in self.items if item.row is not None]


def step(opt: RMSprop, only: Place | None = None) -> None:
    """Updates every parameter that has a gradient; nothing at all if an error is raised here.

    An error of torch's own ``rmsprop``, and no other, leaves those before it updated, as in
    torch. With ``only`` it is about one parameter.
    """
    parts = _parts(opt) if only is None else [_part_of_one(opt, *only)]
    for part in parts:
        _choose(opt, part)
    if all(item.row is not None for part in parts for item in part.items):
        _step_together(opt, parts)
    else:
        _step_in_turn(opt, parts)


def _parts(opt: RMSprop) -> list[Part]:
    """Lists what there is to step, creating state but not storing it."""
    parts, index = [], 0
    for group in opt.param_groups:
        part = Part(group, [], {})
        for p in group["params"]:
            _add(opt, part, index, p)
            index += 1
        parts.append(part)
    return parts


def _part_of_one(opt: RMSprop, place: int, index: int) -> Part:
    """As `_parts`, of one parameter."""
    group = opt.param_groups[place]
    part = Part(group, [], {})
    before = sum(len(other["params"]) for other in opt.param_groups[:place])
    _add(opt, part, before + index, group["params"][index])
    return part


def _add(opt: RMSprop, part: Part, index: int, p: Tensor) -> None:
    """Adds a parameter if it has a gradient."""
    if (grad := p.grad) is None:
        return
    if grad.is_sparse:
        raise RuntimeError("RMSprop does not support sparse gradients")
    known = {**opt.state.get(p, {}), **part.new.get(p, {})}
    new = _missing_state(opt, p, known, part.group)
    if new:
        part.new[p] = {**part.new.get(p, {}), **new}
    part.items.append(Item(index, p, grad, {**known, **new}))


def _choose(opt: RMSprop, part: Part) -> None:
    """Decides which tensors of a group the core takes; ValueError if torch cannot take the rest."""
    group, own = part.group, _own_options(opt, part.group)
    if not (group["capturable"] or group["differentiable"] or is_watched() and not own):
        rows = [_row(item, group) for item in part.items]
        for item, row, takes in zip(part.items, rows, opt._stepper.takes(group, rows)):
            item.row = row if takes else None
    for item in part.items:
        if own and item.row is None:
            raise ValueError(
                f"{own[0]}: expected plain tensors of one shape, float32 or float64, in host"
                f" memory, for torch's own rmsprop has no such option, got"
                f" {opt._stepper.name_in(list(opt.param_groups), item.index)} with {_describe(item, group)}"
            )


def is_watched() -> bool:
    """Whether a TorchDispatchMode is on: tracers and counters see torch's operations only."""
    return torch._C._len_torch_dispatch_stack() > 0


def _own_options(opt: RMSprop, group: Group) -> list[str]:
    """Lists the options in effect that torch's own rmsprop does not have."""
    has_momentum, decays = group["momentum"] > 0, group["weight_decay"] != 0
    options = {
        "eps_in_sqrt": group.get("eps_in_sqrt"),
        "lr_in_momentum": group.get("lr_in_momentum") and has_momentum,
        "nesterov": group.get("nesterov") and has_momentum,
        "bias_correction": group.get("bias_correction"),
        "decoupled_weight_decay": group.get("decoupled_weight_decay") and decays,
        "max_grad_norm": opt.max_grad_norm is not None,
        "nonfinite": opt.nonfinite != "propagate",
    }
    return [option for option, is_on in options.items() if is_on]


def _describe(item: Item, group: Group) -> str:
    tensors = {"p": item.p, "grad": item.grad, **item.entry}
    found = [
        f"{name} {type(x).__name__} {getattr(x, 'dtype', '')} {tuple(getattr(x, 'shape', ()))}"
        f" on {getattr(x, 'device', 'no device')}"
        for name, x in tensors.items()
    ]
    flags = [flag for flag in ("capturable", "differentiable") if group[flag]]
    return ", ".join(found + flags)


def _row(item: Item, group: Group) -> Row:
    """Returns the tensors in which the core would find an item."""
    p, grad, entry = item.p, item.grad, item.entry
    if is_dtensor(p) and is_dtensor(grad) and not _is_placed_like(grad, p):
        grad = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    if type(grad) is Tensor and grad.is_neg():
        grad = grad.resolve_neg()
    m = entry["grad_avg"] if group["centered"] else None
    b = entry["momentum_buffer"] if group["momentum"] > 0 else None
    tensors: tuple[Any, ...] = (p, grad, entry["square_avg"], m, b)
    if is_dtensor(p) and all(x is None or _is_placed_like(x, p) for x in tensors):
        tensors = tuple(x if x is None else _shard(x) for x in tensors)
    return (item.index, *tensors, entry["step"])


def _step_together(opt: RMSprop, parts: list[Part]) -> None:
    """Steps what the core takes all of."""
    listed = [(part.group, part.rows) for part in parts]
    sharded = {
        item.index: item.p
        for part in parts
        for item in part.items
        if is_dtensor(item.p)
    }
    looks = opt.max_grad_norm is not None or opt.nonfinite != "propagate"
    gathered = _gather(opt, listed, sharded) if sharded and looks else None
    # Before the step: written parameters must not be without their state, whatever happens.
    _store(opt, parts)
    try:
        has_stepped = opt._stepper.step_rows(listed, gathered)
    except Exception:
        _discard(opt, parts)
        raise
    if has_stepped:
        torch.autograd.graph.increment_version(list(sharded.values()))
    else:
        _discard(opt, parts)


def _step_in_turn(opt: RMSprop, parts: list[Part]) -> None:
    """Steps one after the other, as torch does, in case that one of them raises.

    No option is on that would have to look at all gradients first.
    """
    opt._accelerator_graph_capture_health_check()
    for part in parts:
        _store(opt, [part])
        for is_left, run in groupby(part.items, lambda item: item.row is None):
            items = list(run)
            if is_left:
                _step_by_torch(part.group, items)
            else:
                opt._stepper.step_rows([(part.group, [item.row for item in items])])
                sharded = [item.p for item in items if is_dtensor(item.p)]
                torch.autograd.graph.increment_version(sharded)


def _store(opt: RMSprop, parts: list[Part]) -> None:
    for part in parts:
        for p, new in part.new.items():
            opt.state[p].update(new)


def _discard(opt: RMSprop, parts: list[Part]) -> None:
    """Takes new state back after a step that was left out."""
    for part in parts:
        for p, new in part.new.items():
            for key in new:
                del opt.state[p][key]
            if not opt.state[p]:
                del opt.state[p]


def _step_by_torch(group: Group, items: list[Item]) -> None:
    def listed(key: str, is_used: bool = True) -> list[Tensor]:
        return [item.entry[key] for item in items] if is_used else []

    names = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")
    flags = ("foreach", "maximize", "differentiable", "capturable")
    torch_rmsprop(
        [item.p for item in items],
        [item.grad for item in items],
        listed("square_avg"),
        listed("grad_avg", group["centered"]),
        listed("momentum_buffer", group["momentum"] > 0),
        listed("step"),
        has_complex=any(torch.is_complex(item.p) for item in items),
        **{key: group[key] for key in (*names, *flags)},
    )


def _missing_state(opt: RMSprop, p: Tensor, entry: Group, group: Group) -> Group:
    """Creates the state that the options need and that is not there, at its start value."""
    # A differentiable step needs to know what it wrote of each.
    is_told_together = _is_small(p) and not group["differentiable"]

    def like(value: float) -> Tensor:
        values = torch.full_like(p, value, memory_format=torch.preserve_format)
        return opt._stepper.tell_together(values) if is_told_together else values

    new: Group = {}
    count = entry.get("step", 0.0)
    if not torch.is_tensor(count):
        new["step"] = count_of(count, p, group)
    if "square_avg" not in entry:
        new["square_avg"] = like(group.get("initial_square_avg", 0.0))
    if group["momentum"] > 0 and "momentum_buffer" not in entry:
        new["momentum_buffer"] = like(0.0)
    if group["centered"] and "grad_avg" not in entry:
        new["grad_avg"] = like(0.0)
    return new


def _is_small(p: Tensor) -> bool:
    """Whether a parameter is one of the small tensors that the core keeps in mind."""
    if type(p) not in (Tensor, torch.nn.Parameter) or p.layout != torch.strided:
        return False
    if is_watched() or torch._C._are_functorch_transforms_active() or p.is_inference():
        return False
    is_float = p.dtype in (torch.float32, torch.float64)
    return is_float and p.is_cpu and p.numel() <= _core.Stepper.SMALL


def count_of(value: float, p: Tensor, group: Group) -> Tensor:
    """Makes a count of updates as torch does."""
    is_double = torch.get_default_dtype() == torch.float64
    dtype = torch.float64 if is_double else torch.float32
    device = p.device if group["capturable"] else None
    return torch.tensor(float(value), dtype=dtype, device=device)


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: importing its module takes long, and without it none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _is_placed_like(tensor: Any, p: Any) -> bool:
    return (
        is_dtensor(tensor)
        and tensor.device_mesh == p.device_mesh
        and tensor.placements == p.placements
    )


def _shard(tensor: Any) -> Any:
    """Returns this process's shard of a DTensor."""
    local = tensor._local_tensor
    # The result of a collective may still be under way.
    return local.wait() if hasattr(local, "wait") else local


def _gather(
    opt: RMSprop, listed: list[tuple[Group, list[Row]]], sharded: dict[int, Tensor]
) -> tuple[float, bool]:
    """Sums the squares of the gradients over all shards; whether one is not finite.

    Every process must come here: it does so for its options and the placements, which are the
    same everywhere, and for no value.
    """
    # By the process groups that shards are spread over: () for what everybody has whole.
    spread: dict[tuple[Any, ...], list[tuple[Group, list[Row]]]] = {}
    for group, rows in listed:
        own: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            own.setdefault(_process_groups(sharded.get(row[0])), []).append(row)
        for process_groups, some in own.items():
            spread.setdefault(process_groups, []).append((group, some))
    squares, has_nonfinite = 0.0, False
    for process_groups, some_rows in spread.items():
        found = opt._stepper.measure(some_rows)
        total = torch.tensor(found, dtype=torch.float64, device="cpu")
        for process_group in process_groups:
            torch.distributed.all_reduce(total, group=process_group)
        squares += total[0].item()
        has_nonfinite |= total[1].item() > 0
    return squares, has_nonfinite


def _process_groups(p: Any) -> tuple[Any, ...]:
    if p is None:
        return ()
    dims = (d for d, place in enumerate(p.placements) if not place.is_replicate())
    return tuple(p.device_mesh.get_group(d) for d in dims)
