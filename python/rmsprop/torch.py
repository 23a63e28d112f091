"""RMSprop for torch: :class:`RMSprop` replaces ``torch.optim.RMSprop``.

Change the import; nothing else changes but the speed::

    from rmsprop.torch import RMSprop

torch 2.10 or newer is needed: its tensors offer the DLPack C exchange API, through which
a step reads all of them in one call. Older ones would have to be asked one by one, which
is most of what a step costs.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from itertools import groupby
from typing import Any, TypeAlias, overload

import numpy as np

try:
    import torch
except ImportError as _error:
    raise ImportError(
        "rmsprop.torch: expected torch 2.10 or newer, got none: pip install 'rmsprop[torch]'"
    ) from _error
if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        f"rmsprop.torch: expected torch 2.10 or newer, got {torch.__version__}"
    )

from torch import Tensor
from torch.autograd import profiler
from torch.optim import optimizer as _base
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.rmsprop import rmsprop as _torch_rmsprop

from rmsprop import _core

__all__ = ["RMSprop"]

_Group: TypeAlias = dict[str, Any]
#: index, p, g, v, m, b, step; as the core takes them.
_Row: TypeAlias = tuple[
    int, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor
]

#: What the core takes, or None, of a parameter, its gradient and its state.
_Item: TypeAlias = tuple[_Row | None, Tensor, Tensor, _Group]

#: The options that torch's RMSprop does not have.
_OWN = (
    "eps_in_sqrt",
    "initial_square_avg",
    "lr_in_momentum",
    "nesterov",
    "bias_correction",
    "decoupled_weight_decay",
    "contiguous_params",
)
#: Those of the optimizer instead of a group.
_OF_OPTIMIZER = ("max_grad_norm", "nonfinite", "threads")


class RMSprop(Optimizer):
    """RMSprop that updates CPU tensors in place, in one fused pass.

    The rule is in the documentation of :mod:`rmsprop`. The arguments that
    ``torch.optim.RMSprop`` has too mean what they mean there, in the same order and
    with the same defaults; so do state, checkpoints, hooks and schedulers. ``foreach``
    makes no difference.

    float32 and float64 tensors in host memory are stepped here, all others
    (CUDA, complex, half precision, ``capturable``, ``differentiable``) by torch's own
    ``rmsprop``, which has none of the options after ``differentiable``.

    Args:
        params: as for every torch optimizer: tensors, ``(name, tensor)`` pairs or
            groups.
        lr: learning rate, per step; a number or a tensor with one element.
        alpha: decay of the averages.
        eps: keeps the divisor away from 0; in units of the gradient, or with
            ``eps_in_sqrt`` of its square.
        weight_decay: L2 penalty, or with ``decoupled_weight_decay`` a shrinking of the
            parameter by ``lr * weight_decay``.
        momentum: decay of the momentum buffer; 0 is off.
        centered: divides by the standard deviation of the gradient instead of its root
            mean square. A variance that rounding made negative counts as 0.
        capturable, foreach, differentiable: as in torch.
        maximize: climbs.
        eps_in_sqrt: ``sqrt(v + eps)`` instead of ``sqrt(v) + eps``.
        initial_square_avg: the value that ``square_avg`` starts at.
        lr_in_momentum: the buffer holds steps instead of scaled gradients.
        nesterov: Nesterov's momentum.
        bias_correction: divides both averages by ``1 - alpha**t``.
        decoupled_weight_decay: see ``weight_decay``.
        max_grad_norm: scales all gradients together by
            ``min(1, max_grad_norm / (norm + 1e-6))``, as ``clip_grad_norm_`` before the
            step does; the gradients are not written. ``last_grad_norm`` is the norm.
            Shards of DTensors count as the whole tensor.
        nonfinite: ``"propagate"``; ``"skip"``: a step with an infinite or NaN gradient
            changes nothing and adds to ``skipped_steps``; ``"raise"``.
        contiguous_params: moves the parameters of one dtype in a group next to each other
            in one flat tensor, those in shared memory or part of another tensor
            excepted. A step still looks at each of them, for ``p.data`` may be changed at
            any time, so it is not faster for it.
        threads: at most so many threads. None: ``RMSPROP_NUM_THREADS``, or else
            ``torch.get_num_threads()``. Small steps stay on the caller.

    Raises:
        TypeError, ValueError: as ``torch.optim.RMSprop``, with the same texts; ValueError
            for a bad value of another option, and from ``step`` where an option is used
            that torch's own ``rmsprop`` does not have.

    Guarantees: within 1 ulp a step of ``torch.optim.RMSprop`` in the plain form
    (``tests/test_torch_oracle.py``); the same bits for every instruction set and number
    of threads.

    Example:
        >>> net = torch.nn.Linear(3, 1)
        >>> opt = RMSprop(net.parameters(), lr=0.01, momentum=0.9, max_grad_norm=40.0)
        >>> net(torch.ones(3)).sum().backward()
        >>> opt.step()
        >>> round(opt.last_grad_norm, 4)
        2.0

    Source: ``torch.optim.RMSprop`` of torch 2.15.
    """

    #: torch.amp.GradScaler leaves the scaling to the step: it sets `grad_scale` and
    #: `found_inf` for the time of a step.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None = None

    _stepper: _core.Stepper

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        eps_in_sqrt: bool = False,
        initial_square_avg: float = 0.0,
        lr_in_momentum: bool = False,
        nesterov: bool = False,
        bias_correction: bool = False,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        nonfinite: str = "propagate",
        contiguous_params: bool = False,
        threads: int | None = None,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        # torch's own words, for programs that look for them. `not 0 <= x` is true of NaN.
        for text, value in (
            ("learning rate", lr),
            ("epsilon value", eps),
            ("momentum value", momentum),
            ("weight_decay value", weight_decay),
            ("alpha value", alpha),
        ):
            if not 0.0 <= value:
                raise ValueError(f"Invalid {text}: {value}")
        self._stepper = _core.Stepper()
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.threads = threads
        own = {
            "eps_in_sqrt": eps_in_sqrt,
            "initial_square_avg": initial_square_avg,
            "lr_in_momentum": lr_in_momentum,
            "nesterov": nesterov,
            "bias_correction": bias_correction,
            "decoupled_weight_decay": decoupled_weight_decay,
            "contiguous_params": contiguous_params,
        }
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        _core.check_torch_options({**defaults, **own}, "")
        # Groups and checkpoints of a plain RMSprop have the very keys that torch's have:
        # torch.distributed.checkpoint insists on them.
        used = {key: value for key, value in own.items() if value}
        super().__init__(params, {**defaults, **used})

    @property
    def max_grad_norm(self) -> float | None:
        """The greatest norm that all gradients together may have; None for no limit."""
        return self._stepper.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._stepper.max_grad_norm = value

    @property
    def nonfinite(self) -> str:
        """What a step does with an infinite or NaN gradient."""
        return self._stepper.nonfinite

    @nonfinite.setter
    def nonfinite(self, value: str) -> None:
        self._stepper.nonfinite = value

    @property
    def threads(self) -> int | None:
        """The greatest number of threads of a step; None for as many as torch uses."""
        return self._stepper.threads

    @threads.setter
    def threads(self, value: int | None) -> None:
        self._stepper.threads = value

    @property
    def last_grad_norm(self) -> float | None:
        """The L2 norm over all gradients at the last step, before clipping.

        Also of a step that was skipped; None without ``max_grad_norm``.
        """
        return self._stepper.last_grad_norm

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because of infinite or NaN gradients."""
        return self._stepper.skipped_steps

    def __getstate__(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in (*_OF_OPTIMIZER, "skipped_steps")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # From a pickle, or (only "state" and "param_groups") from load_state_dict.
        state = dict(state)
        if "_stepper" not in self.__dict__:
            self._stepper = _core.Stepper()
        for key in (*_OF_OPTIMIZER, "skipped_steps"):
            if key in state:
                setattr(self._stepper, key, state.pop(key))
        # A checkpoint that does not know an option leaves it as it is.
        current = self.__dict__.get("param_groups", ())
        super().__setstate__(state)
        for index, group in enumerate(self.param_groups):
            group.setdefault("momentum", 0)
            group.setdefault("centered", False)
            group.setdefault("foreach", None)
            group.setdefault("maximize", False)
            group.setdefault("differentiable", False)
            group.setdefault("capturable", False)
            known = current[index] if index < len(current) else {}
            for key in _OWN:
                if key in known or key in self.defaults:
                    group.setdefault(key, known.get(key, self.defaults.get(key)))
            for p in group["params"]:
                entry = self.state.get(p, {})
                if entry and not torch.is_tensor(entry["step"]):
                    entry["step"] = _step_tensor(float(entry["step"]), p, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what this class, ``torch.optim.RMSprop`` or ``rmsprop.RMSprop`` saved.

        Options that the checkpoint does not have stay as they are. As with every torch
        optimizer, tensors that need no other dtype or device are not copied; arrays are.
        """
        state = {
            key: {name: _tensor_of(value) for name, value in entry.items()}
            if isinstance(entry, dict)
            else entry
            for key, entry in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state})

    def add_param_group(self, param_group: _Group) -> None:
        """Adds a group of parameters with options of its own; the others are defaults.

        Raises:
            TypeError, ValueError: as torch; ValueError for a bad value of an option that
                torch does not have. No group is added then.
        """
        super().add_param_group(param_group)
        try:
            place = f" of group {len(self.param_groups) - 1}"
            _core.check_torch_options(param_group, place)
        except Exception:
            self.param_groups.pop()
            raise
        if param_group.get("contiguous_params"):
            _flatten(param_group["params"])

    def _update(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs a step, without the hooks around it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._stepper.step(self.param_groups, self.state):
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                self._update_any()
        return loss

    #: The same inside torch's own wrapper: hooks, and a range for the profiler.
    _update_hooked = Optimizer.profile_hook_step(_update)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, *args: Any, **kwargs: Any) -> float | None:
        """Updates every parameter that has a gradient, in place.

        Writes the parameters and their state, not the gradients. The GIL is released
        while a long step computes; threads that step one optimizer take turns.

        Args:
            closure: called first, with gradients enabled; its value is returned.

        Raises:
            ValueError: for a tensor that only torch's own ``rmsprop`` takes, where an
                option is on that it does not have; nothing is changed then.
            FloatingPointError: with ``nonfinite="raise"``; nothing is changed then.
            RuntimeError: for a sparse gradient.
        """
        # torch's wrapper costs more than a small step: it is used when there is a need.
        if (
            args
            or kwargs
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _base._global_optimizer_pre_hooks
            or _base._global_optimizer_post_hooks
            or profiler._is_profiler_enabled
            or self.found_inf is not None
        ):
            if self.found_inf is not None and not self._unscale(self.found_inf):
                return None
            return self._update_hooked(*args, **kwargs)
        if not self._stepper.step(self.param_groups, self.state):
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                self._update_any()
        return None

    def _update_any(self) -> None:
        """Performs a step of which something is not ordinary: new state, DTensors, others."""
        plan: list[tuple[_Group, dict[Tensor, _Group], list[_Item]]] = []
        sharded: dict[int, Tensor] = {}
        index = 0
        for group in self.param_groups:
            created: dict[Tensor, _Group] = {}
            items: list[_Item] = []
            for p in group["params"]:
                grad = p.grad
                if grad is not None:
                    if grad.is_sparse:
                        raise RuntimeError("RMSprop does not support sparse gradients")
                    entry = {**self.state.get(p, {}), **created.get(p, {})}
                    new = _missing_state(p, entry, group)
                    if new:
                        created[p] = {**created.get(p, {}), **new}
                        entry.update(new)
                    row = self._row(index, p, grad, entry, group)
                    if row is None:
                        self._check_counterpart(index, p, group)
                    elif _is_dtensor(p):
                        sharded[index] = p
                    items.append((row, p, grad, entry))
                index += 1
            plan.append((group, created, items))

        taken = [
            (group, [row for row, *_ in items if row is not None])
            for group, _, items in plan
        ]
        if sum(len(rows) for _, rows in taken) == sum(len(x) for _, _, x in plan):
            looks = self.max_grad_norm is not None or self.nonfinite != "propagate"
            gathered = self._gather(taken, sharded) if sharded and looks else None
            if self._stepper.step_rows(taken, gathered):
                for _, created, _ in plan:
                    self._store(created)
                torch.autograd.graph.increment_version(list(sharded.values()))
            return
        # One after the other, as torch does it, in case that one of them raises. No option is on
        # that must look at all gradients first.
        self._accelerator_graph_capture_health_check()
        for group, created, items in plan:
            self._store(created)
            for is_left, run in groupby(items, key=lambda item: item[0] is None):
                if is_left:
                    _update_by_torch(group, list(run))
                else:
                    rows, params, *_ = zip(*run)
                    self._stepper.step_rows([(group, list(rows))])
                    outer = [p for p in params if _is_dtensor(p)]
                    torch.autograd.graph.increment_version(outer)

    def _store(self, created: dict[Tensor, _Group]) -> None:
        for p, new in created.items():
            self.state[p].update(new)

    def _row(
        self, index: int, p: Tensor, grad: Tensor, entry: _Group, group: _Group
    ) -> _Row | None:
        """Returns what the core takes of a parameter, or None if it does not."""
        if group["capturable"] or group["differentiable"]:
            return None
        # Tracers and counters see torch's operations and nothing else.
        is_watched = torch._C._len_torch_dispatch_stack() > 0
        if is_watched and not self._own_options(group):
            return None
        if _is_dtensor(p) and _is_dtensor(grad) and not _is_placed_like(grad, p):
            grad = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
        if type(grad) is Tensor and grad.is_neg():
            grad = grad.resolve_neg()
        v, m = entry["square_avg"], entry.get("grad_avg") if group["centered"] else None
        b = entry.get("momentum_buffer") if group["momentum"] > 0 else None
        tensors: tuple[Any, ...] = (p, grad, v, m, b)
        if _is_dtensor(p):
            if not all(x is None or _is_placed_like(x, p) for x in tensors):
                return None
            tensors = tuple(x if x is None else _local(x) for x in tensors)
        if not self._stepper.takes(group, (*tensors, entry["step"])):
            return None
        return (index, *tensors, entry["step"])

    def _own_options(self, group: _Group) -> list[str]:
        """Lists the options in effect that torch's own rmsprop does not have."""
        has_momentum, decays = group["momentum"] > 0, group["weight_decay"] != 0
        options = {
            "eps_in_sqrt": group.get("eps_in_sqrt"),
            "lr_in_momentum": group.get("lr_in_momentum") and has_momentum,
            "nesterov": group.get("nesterov") and has_momentum,
            "bias_correction": group.get("bias_correction"),
            "decoupled_weight_decay": group.get("decoupled_weight_decay") and decays,
            "max_grad_norm": self.max_grad_norm is not None,
            "nonfinite": self.nonfinite != "propagate",
        }
        return [option for option, is_on in options.items() if is_on]

    def _check_counterpart(self, index: int, p: Tensor, group: _Group) -> None:
        """Checks that a step of torch's own is the one that was asked for."""
        for option in self._own_options(group):
            flags = [flag for flag in ("capturable", "differentiable") if group[flag]]
            found = " ".join([str(p.dtype), "on", str(p.device), *flags])
            raise ValueError(
                f"{option}: expected float32 or float64 in host memory, for torch's own"
                f" rmsprop has no such option, got {self._name(index)},"
                f" {type(p).__name__} of {found}"
            )

    def _name(self, index: int) -> str:
        """Names a parameter in a message: "parameter 3 ('fc.weight')"."""
        names = [
            name
            for group in self.param_groups
            for name in group.get("param_names", [None] * len(group["params"]))
        ]
        return f"parameter {index}" + (f" ({names[index]!r})" if names[index] else "")

    def _gather(
        self, taken: list[tuple[_Group, list[_Row]]], sharded: dict[int, Tensor]
    ) -> tuple[float, bool]:
        """Sums the squares of the gradients over all shards; whether one is not finite.

        Every process must come here: it does so for its options and the placements, which
        are the same everywhere, and for no value.
        """
        parts: dict[Any, list[tuple[_Group, list[_Row]]]] = {}
        for group, rows in taken:
            own: dict[Any, list[_Row]] = {}
            for row in rows:
                own.setdefault(_shard_groups(sharded.get(row[0])), []).append(row)
            for part, part_rows in own.items():
                parts.setdefault(part, []).append((group, part_rows))
        squares, has_nonfinite = 0.0, False
        for process_groups, listed in parts.items():
            total = torch.tensor(self._stepper.measure(listed), dtype=torch.float64)
            for process_group in process_groups:
                torch.distributed.all_reduce(total, group=process_group)
            squares += total[0].item()
            has_nonfinite |= total[1].item() > 0
        return squares, has_nonfinite

    def _unscale(self, found_inf: Tensor) -> bool:
        """Does what torch.amp.GradScaler leaves to the step; whether there is one.

        As for an optimizer without this contract, gradients are left unscaled, and hooks
        do not see a step that is left out.
        """
        if not isinstance(found_inf, Tensor):
            raise AssertionError(  # noqa: TRY004
                "No inf checks were recorded for this optimizer."  # torch's own words
            )
        if self.grad_scale is not None:
            inverse = self.grad_scale.double().reciprocal().float()
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            p.grad.mul_(inverse.to(p.grad.device))
        is_finite = found_inf.item() == 0
        if not is_finite:
            self._stepper.skip()
        return is_finite


# torch wraps a step that is not `hooked`. Dynamo breaks the graph at what is disabled.
_step: Any = RMSprop.step
_step.hooked = True
_step.__signature__ = inspect.signature(RMSprop._update)
for _function in (_step, RMSprop._update_hooked):
    _function._torchdynamo_disable = True  # type: ignore[union-attr]
    _function._torchdynamo_disable_msg = "a step of rmsprop is compiled already"  # type: ignore[union-attr]


def _flatten(params: list[Tensor]) -> None:
    """Moves parameters next to each other."""
    for dtype in (torch.float32, torch.float64):
        members = [p for p in params if p.dtype == dtype and _is_movable(p)]
        flat = torch.empty(sum(p.numel() for p in members), dtype=dtype)
        start = 0
        for p in members:
            home = flat.as_strided(p.size(), p.stride(), start)
            home.copy_(p.detach())
            p.data = home
            start += p.numel()


def _is_movable(p: Tensor) -> bool:
    if type(p) not in (Tensor, torch.nn.Parameter) or not p.is_cpu:
        return False
    if p.layout != torch.strided:
        return False
    # All of its storage is its own, and in other hands it would not follow.
    return p.untyped_storage().nbytes() == p.nbytes and not p.is_shared()  # type: ignore[no-untyped-call]


def _step_tensor(value: float, p: Tensor, group: _Group) -> Tensor:
    """Makes the count of updates as torch does."""
    is_double = torch.get_default_dtype() == torch.float64
    dtype = torch.float64 if is_double else torch.float32
    device = p.device if group["capturable"] else None
    return torch.tensor(value, dtype=dtype, device=device)


def _missing_state(p: Tensor, entry: _Group, group: _Group) -> _Group:
    """Creates the state that the options need and that is not there, at its start."""
    like = functools.partial(torch.full_like, p, memory_format=torch.preserve_format)
    new: _Group = {}
    if "step" not in entry:
        new["step"] = _step_tensor(0.0, p, group)
    elif not torch.is_tensor(entry["step"]):
        new["step"] = _step_tensor(float(entry["step"]), p, group)
    if "square_avg" not in entry:
        new["square_avg"] = like(group.get("initial_square_avg", 0.0))
    if group["momentum"] > 0 and "momentum_buffer" not in entry:
        new["momentum_buffer"] = like(0.0)
    if group["centered"] and "grad_avg" not in entry:
        new["grad_avg"] = like(0.0)
    return new


def _update_by_torch(group: _Group, items: list[_Item]) -> None:
    """Updates tensors by torch's own rmsprop."""
    _, params, grads, entries = (list(column) for column in zip(*items))

    def listed(key: str, is_used: bool = True) -> list[Tensor]:
        return [entry[key] for entry in entries] if is_used else []

    _torch_rmsprop(
        params,
        grads,
        listed("square_avg"),
        listed("grad_avg", group["centered"]),
        listed("momentum_buffer", group["momentum"] > 0),
        listed("step"),
        has_complex=any(torch.is_complex(p) for p in params),
        **{
            key: group[key]
            for key in (
                *("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
                *("foreach", "maximize", "differentiable", "capturable"),
            )
        },
    )


def _tensor_of(value: Any) -> Any:
    """Copies an array of NumPy's, or a count of updates, into a tensor."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value


def _is_dtensor(tensor: Tensor) -> bool:
    # Importing the module takes long, and without it there is no DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _is_placed_like(tensor: Any, p: Any) -> bool:
    return (
        _is_dtensor(tensor)
        and tensor.device_mesh == p.device_mesh
        and tensor.placements == p.placements
    )


def _local(tensor: Any) -> Tensor:
    """Returns this process's shard of a DTensor."""
    local: Any = tensor._local_tensor
    # The result of a collective that may still be under way.
    shard: Tensor = local.wait() if hasattr(local, "wait") else local
    return shard


def _shard_groups(p: Any) -> tuple[Any, ...]:
    """Returns the process groups that a parameter's shards are spread over."""
    if p is None:
        return ()
    dims = (d for d, place in enumerate(p.placements) if not place.is_replicate())
    return tuple(p.device_mesh.get_group(d) for d in dims)
