"""What a step of :mod:`rmsprop.torch` does with tensors that are not ordinary.

Tensors without state get some; of a DTensor this process's shard is stepped, and pending signs
are resolved; what the core still does not take goes to torch's own ``rmsprop``, alone. Here
Python looks at each tensor; the arithmetic is the core's, or torch's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.optim.rmsprop import rmsprop as torch_rmsprop

from rmsprop import average, torch_storage
from rmsprop.state import as_ndarray
from rmsprop.storage import SCALE
from rmsprop.torch_names import (
    check_capture,
    increment_all,
    is_dtensor,
    is_watched,
    shard,
)

Group: TypeAlias = dict[str, Any]
#: A group's place in ``opt.param_groups`` and a parameter's place in the group.
Place: TypeAlias = tuple[int, int]
#: A parameter, its gradient, its state by key, and whether its average begins: what the core is given.
Row: TypeAlias = tuple[Any, Any, dict[str, Any], bool]


class Steps(Protocol):
    """What is used of an optimizer: `rmsprop.torch.RMSprop`."""

    param_groups: list[Group]
    state: Any
    #: What ends its steps in backward, while they are on.
    _in_backward: Any

    def _step(self, only: Place | None = None) -> None: ...

    @property
    def _stepper(
        self,
    ) -> Any: ...  # a _core.Stepper, which is no cached property to pyright

    @property
    def max_grad_norm(self) -> float | None: ...
    @property
    def nonfinite(self) -> str: ...
    @property
    def state_dtype(self) -> Any: ...
    @property
    def rounding(self) -> str: ...
    @property
    def master_weight_bits(self) -> int | None: ...


@dataclass
class Odd:
    """A parameter that has a gradient, and is not ordinary."""

    group: Group
    p: Tensor
    grad: Tensor
    #: Its state, with what is new.
    entry: Group
    #: What is not in ``opt.state`` yet.
    new: Group


@dataclass
class Plan:
    """What is done in a step with the parameters that are not ordinary, by index."""

    #: What the core is given instead; None for what it leaves alone.
    rows: dict[int, Row | None] = field(default_factory=dict)
    odd: dict[int, Odd] = field(default_factory=dict)


def step(opt: Steps, only: Place | None = None, odd: list[int] | None = None) -> None:
    """Updates every parameter that has a gradient; nothing at all if an error is raised here.

    An error of torch's own ``rmsprop``, and no other, leaves others updated, as in torch. With
    ``only`` it is about one parameter. ``odd`` lists those that the core has found not ordinary.
    """
    plan = Plan()
    everything = range(sum(len(group["params"]) for group in opt.param_groups))
    # None: nothing has looked yet.
    found: Any = everything if is_watched() else odd or []
    while True:
        _add(opt, plan, found, only)
        gathered = None
        if _looks(opt) and any(is_dtensor(each.p) for each in plan.odd.values()):
            # All processes gather, and once: so nothing may be found out later.
            _add(opt, plan, everything, only)
            gathered = _gather(opt, plan)
        _store(plan, opt.state)
        try:
            found = opt._stepper.step(
                opt.param_groups, opt.state, only, plan.rows, gathered
            )
        except BaseException:
            _discard(plan, opt.state)
            raise
        if found is True:
            break
        _discard(plan, opt.state)
        if found is False:
            return
        if not plan.rows.keys().isdisjoint(found):
            raise RuntimeError(
                "expected tensors to stay as they are during a step, got others"
            )
    sharded = (each.p for each in plan.odd.values() if is_dtensor(each.p))
    increment_all(sharded)
    _step_by_torch(plan)


def _looks(opt: Steps) -> bool:
    """Whether an option looks at all gradients before a step."""
    return opt.max_grad_norm is not None or opt.nonfinite != "propagate"


def _add(opt: Steps, plan: Plan, indices: Any, only: Place | None) -> None:
    """Decides what to do with these parameters."""
    wanted = set(indices) - plan.rows.keys()
    first = 0
    for place, group in enumerate(opt.param_groups):
        for at, p in enumerate(group["params"]):
            is_meant = only is None or only == (place, at)
            if first + at in wanted and is_meant:
                _add_one(opt, plan, first + at, group, p)
        first += len(group["params"])


def _add_one(opt: Steps, plan: Plan, index: int, group: Group, p: Tensor) -> None:
    if (grad := p.grad) is None:
        plan.rows[index] = None
        return
    # What a parameter that is listed twice was given is not made again.
    twins = (odd.new for odd in plan.odd.values() if odd.p is p)
    given = next(twins, {})
    known = {**opt.state.get(p, {}), **given}
    own = _own_options(opt, group)
    is_left = group["capturable"] or group["differentiable"] or is_watched() and not own
    stepper = None if is_left else opt._stepper
    # Steps of some rows begin the average of all.
    new = missing_state(stepper, p, known, group, begins=not grad.is_sparse)
    odd = Odd(group, p, grad, {**known, **new}, new)
    is_sharded = grad.is_sparse and is_dtensor(p)
    row = None if is_left or is_sharded else _row(odd)
    asked = row
    if row is not None and grad.is_sparse:
        name = opt._stepper.name_in(list(opt.param_groups), index)
        indices, values = _rows(grad, odd, name.replace("parameter", "gradient", 1))
        row = (row[0], (indices, values), *row[2:])
        asked = (row[0], (indices[:0], values[:0]), *row[2:])
    if asked is not None and not opt._stepper.takes(group, asked):
        row = None
    if row is None and grad.is_sparse:
        raise RuntimeError("RMSprop does not support sparse gradients")
    if row is None:
        check_capture(opt)
    if row is None and own:
        name = opt._stepper.name_in(list(opt.param_groups), index)
        raise ValueError(
            f"{own[0]}: expected plain tensors of one shape, of floats or complex numbers, in host"
            f" memory, for torch's own rmsprop has no such option, got {name} with {_describe(odd)}"
        )
    plan.rows[index] = row
    plan.odd[index] = odd


def check_new(opt: Steps, group: Group) -> None:
    """Refuses tensors of the last group that cannot be stepped with the options in effect."""
    opt._stepper.check_storage(group, f" of group {len(opt.param_groups) - 1}")
    own = _own_options(opt, group)
    first = sum(len(other["params"]) for other in opt.param_groups[:-1])
    for index, p in enumerate(group["params"], start=first):
        name = opt._stepper.name_in(list(opt.param_groups), index)
        dtype = str(p.dtype).removeprefix("torch.")
        if wanted := opt._stepper.refuses(dtype):
            raise ValueError(f"{name}: expected {wanted}, got {dtype}")
        is_ours = p.dtype in torch_storage.DTYPES and p.device.type in ("cpu", "meta")
        if own and not is_ours:
            raise ValueError(
                f"{name}: expected floats or complex numbers in host memory, got"
                f" {dtype} on {p.device}, which is left to torch's"
                f" own rmsprop, and that has no {own[0]}"
            )


def _own_options(opt: Steps, group: Group) -> list[str]:
    """Lists the options in effect that torch's own rmsprop does not have."""
    has_momentum, decays = group["momentum"] > 0, group["weight_decay"] != 0
    options = {
        "eps_in_sqrt": group.get("eps_in_sqrt"),
        "lr_in_momentum": group.get("lr_in_momentum") and has_momentum,
        "nesterov": group.get("nesterov") and has_momentum,
        "bias_correction": group.get("bias_correction"),
        "decoupled_weight_decay": group.get("decoupled_weight_decay") and decays,
        "clip_weights": group.get("clip_weights") is not None,
        "ema_decay": group.get("ema_decay") is not None,
        "max_grad_norm": opt.max_grad_norm is not None,
        "nonfinite": opt.nonfinite != "propagate",
        "state_dtype": opt.state_dtype is not None,
        "rounding": opt.rounding != "nearest",
        "master_weight_bits": opt.master_weight_bits is not None,
    }
    return [option for option, is_on in options.items() if is_on]


def _describe(odd: Odd) -> str:
    tensors = {"p": odd.p, "grad": odd.grad, **odd.entry}
    found = [
        f"{name} {type(x).__name__} {getattr(x, 'dtype', '')} {tuple(getattr(x, 'shape', ()))}"
        f" on {getattr(x, 'device', 'no device')}"
        for name, x in tensors.items()
    ]
    flags = [flag for flag in ("capturable", "differentiable") if odd.group[flag]]
    return ", ".join(found + flags)


def _row(odd: Odd) -> Row:
    """Returns the tensors in which the core would find a parameter."""
    p, grad, entry = odd.p, odd.grad, odd.entry
    if is_dtensor(p) and is_dtensor(grad) and not _is_placed_like(grad, p):
        grad = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    if type(grad) is Tensor:
        grad = grad.resolve_conj().resolve_neg()
    keys = _used(odd.group)
    keys += [key + SCALE for key in keys] + ["error_bits"]
    state = {key: entry[key] for key in keys if key in entry}
    tensors = [p, grad, *state.values()]
    if is_dtensor(p) and all(_is_placed_like(x, p) for x in tensors):
        p, grad = shard(p), shard(grad)
        state = {key: shard(x) for key, x in state.items()}
    begins = "ema" in odd.new and not grad.is_sparse
    return (p, grad, {**state, "step": entry["step"]}, begins)


def _used(group: Group) -> list[str]:
    """The keys of the arrays of state that the options use."""
    is_used = {
        "square_avg": True,
        "momentum_buffer": group["momentum"] > 0,
        "grad_avg": group["centered"],
        "ema": group.get("ema_decay") is not None,
    }
    return [key for key, is_it in is_used.items() if is_it]


def _rows(grad: Tensor, odd: Odd, name: str) -> tuple[Any, Tensor]:
    """The indices and the values of a gradient of rows, as given; its tensor may be unchecked."""
    p = odd.p
    if grad.sparse_dim() != 1:
        raise ValueError(
            f"{name}: expected a gradient of rows, got one with {grad.sparse_dim()} sparse dimensions"
        )
    indices, values = grad._indices()[0].numpy(), grad._values()
    if not values.dtype.is_floating_point:
        raise TypeError(f"{name}: expected floats, got {values.dtype}")
    if values.shape != (len(indices), *p.shape[1:]):
        raise ValueError(
            f"{name}: expected values of shape {(len(indices), *p.shape[1:])}, got {tuple(values.shape)}"
        )
    for index in (indices.min(), indices.max()) if len(indices) else ():
        if not 0 <= index < p.shape[0]:
            raise ValueError(
                f"{name}: expected indices from 0 to {p.shape[0] - 1}, got {index}"
            )
    if any(key + SCALE in odd.entry for key in _used(odd.group)):
        raise ValueError(
            f"{name}: expected a dense gradient with state in uint8, got one of rows, which share"
            " blocks"
        )
    return np.ascontiguousarray(indices), values


def _is_placed_like(tensor: Any, p: Any) -> bool:
    return (
        is_dtensor(tensor)
        and tensor.device_mesh == p.device_mesh
        and tensor.placements == p.placements
    )


def _store(plan: Plan, state: Any) -> None:
    """Before the step: written parameters must not be without their state, whatever happens."""
    for odd in plan.odd.values():
        if odd.new:
            state[odd.p].update(odd.new)


def _discard(plan: Plan, state: Any) -> None:
    """Takes new state back after a step that was left out."""
    for odd in plan.odd.values():
        for key in odd.new:
            state[odd.p].pop(key, None)
        if odd.new and not state[odd.p]:
            del state[odd.p]


def _step_by_torch(plan: Plan) -> None:
    """Steps what the core has left alone, group by group."""
    left: dict[int, list[Odd]] = {}
    for index, odd in plan.odd.items():
        if plan.rows[index] is None:
            left.setdefault(id(odd.group), []).append(odd)
    for members in left.values():
        group = members[0].group

        def listed(key: str, is_used: bool = True, of: list[Odd] = members) -> Any:
            return [odd.entry[key] for odd in of] if is_used else []

        names = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")
        flags = ("foreach", "maximize", "differentiable", "capturable")
        torch_rmsprop(
            [odd.p for odd in members],
            [odd.grad for odd in members],
            listed("square_avg"),
            listed("grad_avg", group["centered"]),
            listed("momentum_buffer", group["momentum"] > 0),
            listed("step"),
            has_complex=any(torch.is_complex(odd.p) for odd in members),
            **{key: group[key] for key in (*names, *flags)},
        )


def missing_state(
    stepper: Any, p: Tensor, entry: Group, group: Group, begins: bool
) -> Group:
    """Creates the state that the options need and that is not there, at its start value.

    Without a stepper it is torch's own: of the parameter's type. An average ``begins`` with the
    step that it is made for, or else is the parameter as it is.
    """

    def dtype_of(key: str) -> Any:
        if stepper is None:
            return None if key == "error_bits" else p.dtype
        return torch_storage.dtype_of(stepper, key, p)

    new: Group = {}
    count = entry.get("step", 0.0)
    if not torch.is_tensor(count):
        new["step"] = count_of(count, p, group)
    dtype = dtype_of("error_bits")
    if dtype is not None and "error_bits" not in entry:
        new |= torch_storage.start(p, "error_bits", dtype, 0, 5)
    for place, key in enumerate(_used(group), start=1):
        if key == "ema" and key not in entry and not begins:
            error_bits = entry.get("error_bits")
            new[key] = torch_storage.copy_of(p, dtype_of(key), error_bits, place)
        elif key not in entry:
            value = group.get("initial_square_avg", 0.0) if key == "square_avg" else 0.0
            new |= torch_storage.start(p, key, dtype_of(key), value, place)
    return new


def averaged(opt: Steps) -> AbstractContextManager[None]:
    """A context in which parameters and their averages have changed places."""
    tensors: list[Tensor] = []
    for group in opt.param_groups:
        for p in group["params"]:
            if "ema" in opt.state.get(p, {}):
                tensors += [p, opt.state[p]["ema"]]
    tensors = [shard(x) if is_dtensor(x) else x for x in tensors]
    arrays = [_as_array(x) for x in tensors]
    pairs = list(zip(arrays[::2], arrays[1::2]))
    return average.averaged(opt._stepper, pairs, tensors)


def _as_array(tensor: Tensor) -> Any:
    tensor = tensor.detach()
    return as_ndarray(
        torch.view_as_real(tensor) if torch.is_complex(tensor) else tensor
    )


def count_of(value: float, p: Tensor, group: Group) -> Tensor:
    """Makes a count of updates as torch does."""
    is_double = torch.get_default_dtype() == torch.float64
    dtype = torch.float64 if is_double else torch.float32
    device = p.device if group["capturable"] else None
    return torch.tensor(float(value), dtype=dtype, device=device)


def _gather(opt: Steps, plan: Plan) -> tuple[float, bool]:
    """Sums the squares of the gradients over all shards; whether one is not finite.

    Every process must come here: it does so for its options and the placements, which are the
    same everywhere, and for no value.
    """
    # By the process groups that shards are spread over: () for what everybody has whole.
    spread: dict[tuple[Any, ...], dict[int, Row]] = {}
    for index, row in plan.rows.items():
        if row is not None:
            process_groups = _process_groups(plan.odd[index].p)
            spread.setdefault(process_groups, {})[index] = row
    squares, has_nonfinite = 0.0, False
    for process_groups, some in spread.items():
        found = opt._stepper.measure(opt.param_groups, some)
        total = torch.tensor(found, dtype=torch.float64, device="cpu")
        for process_group in process_groups:
            torch.distributed.all_reduce(total, group=process_group)
        squares += total[0].item()
        has_nonfinite |= total[1].item() > 0
    return squares, has_nonfinite


def _process_groups(p: Any) -> tuple[Any, ...]:
    if not is_dtensor(p):
        return ()
    dims = (d for d, place in enumerate(p.placements) if not place.is_replicate())
    return tuple(p.device_mesh.get_group(d) for d in dims)
