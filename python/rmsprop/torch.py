"""RMSprop for torch: :class:`RMSprop` replaces ``torch.optim.RMSprop``.

Change the import; nothing else changes but the speed::

    from rmsprop.torch import RMSprop

torch 2.10 or newer is needed: its library has the C functions by which a step finds where
tensors are and uses torch's threads.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

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
from torch.optim.optimizer import Optimizer, ParamsT

from rmsprop import _core, backward, fallback, torch_names, torch_storage
from rmsprop.state import as_ndarray
from rmsprop.storage import SCALE, HasStorage, Storage, joined

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rmsprop.types import Nonfinite, Rounding, StateDType

__all__ = ["RMSprop"]

_Group: TypeAlias = dict[str, Any]
_Loss = TypeVar("_Loss", float, Tensor)
#: The options that torch's RMSprop does not have.
_OWN = tuple(name for name, is_torchs in _core.OPTIONS if not is_torchs)
#: Those of the optimizer instead of a group.
_OF_OPTIMIZER = ("max_grad_norm", "nonfinite", "threads")


class _Lock:
    """A lock of this process: after a fork the parent's may be held by a thread that is not there."""

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self.process = os.getpid()


class RMSprop(HasStorage, Optimizer):
    """RMSprop that updates CPU tensors in place, in one fused pass.

    The rule is in the documentation of :mod:`rmsprop`. The arguments that
    ``torch.optim.RMSprop`` has too mean what they mean there, in the same order and
    with the same defaults; so do state, checkpoints, hooks and schedulers. ``foreach``
    makes no difference.

    Tensors of floats and complex numbers in host memory are stepped here, on torch's own
    threads; all others (CUDA, ``capturable``, ``differentiable``) by torch's
    own ``rmsprop``, which has none of the options after ``differentiable``. Those of 16 bits
    compute in float32, as does their state. Of a sparse gradient of rows (``Embedding`` and
    ``EmbeddingBag`` with ``sparse=True``) only those rows and their state are touched.

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
        cautious_weight_decay: decays only where the update, too, moves a parameter towards 0
            (arXiv:2510.12402). Needs ``decoupled_weight_decay``.
        corrected_weight_decay: decays by ``lr * lr / initial_lr * weight_decay`` (timm), so
            that decay follows a schedule as steps do; ``initial_lr`` is the key of a group
            that schedulers write, or else the first step. Needs ``decoupled_weight_decay``.
        clip_weights: keeps parameters from ``-clip_weights`` to ``clip_weights``, after the
            update (WGAN); None for no limit.
        ema_decay: keeps an average of each parameter, the state ``ema``, in the same pass:
            ``e = ema_decay * e + (1 - ema_decay) * p``, after the update, from the parameter
            before its first one on. :meth:`averaged` puts it in the parameter's place.
        max_grad_norm: scales all gradients together by
            ``min(1, max_grad_norm / (norm + 1e-6))``, as ``clip_grad_norm_`` before the
            step does; the gradients are not written. ``last_grad_norm`` is the norm.
            Shards of DTensors count as the whole tensor.
        nonfinite: ``"propagate"``; ``"skip"``: a step with an infinite or NaN gradient
            changes nothing and adds to ``skipped_steps``; ``"raise"``.
        contiguous_params: moves the parameters of one dtype in a group next to each other
            in one flat tensor, those in shared memory or part of another tensor
            excepted; what else was in a parameter's memory stays behind. A step still
            looks at each of them, for ``p.data`` may be changed at any time, so it is
            not faster for it.
        threads: at most so many threads. None: ``RMSPROP_NUM_THREADS``, or else
            ``torch.get_num_threads()``. Small steps stay on the caller.
        state_dtype: the type of the state of float32 and 16-bit parameters: ``"float32"``;
            ``"bfloat16"``, rounded at random so that averages do not stick; ``"uint8"``, codes
            of which 256 share a scale (parameters of more than 4,096 elements; without
            ``centered``); or a mapping from keys of the state to these. ``ema`` stays wide
            unless named.
        rounding: of parameters of 16 bits: ``"nearest"``, which loses small updates, or
            ``"stochastic"``, which keeps them on average.
        master_weight_bits: keeps what rounding takes from a bfloat16 parameter in the state
            ``error_bits``: with 32 training is float32's, bit for bit
            (:meth:`float32_params`); with 24 in half the memory. None keeps nothing.
        seed: of the random bits, which depend on it, the parameter, the update and the element
            alone. Restart with the same one: it is in no checkpoint, as are the three before.

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
    #: What step_in_backward() has returned, while it is on; in no pickle.
    _in_backward: backward.Handle | None = None

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
        cautious_weight_decay: bool = False,
        corrected_weight_decay: bool = False,
        clip_weights: float | None = None,
        ema_decay: float | None = None,
        max_grad_norm: float | None = None,
        nonfinite: Nonfinite = "propagate",
        contiguous_params: bool = False,
        threads: int | None = None,
        state_dtype: StateDType = None,
        rounding: Rounding = "nearest",
        master_weight_bits: int | None = None,
        seed: int = 0,
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
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.threads = threads
        self._store(Storage(state_dtype, rounding, master_weight_bits, seed))
        own = {
            "eps_in_sqrt": eps_in_sqrt,
            "initial_square_avg": initial_square_avg,
            "lr_in_momentum": lr_in_momentum,
            "nesterov": nesterov,
            "bias_correction": bias_correction,
            "decoupled_weight_decay": decoupled_weight_decay,
            "cautious_weight_decay": cautious_weight_decay,
            "corrected_weight_decay": corrected_weight_decay,
            "clip_weights": clip_weights,
            "ema_decay": ema_decay,
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
        if ema_decay is not None:  # 0 is none of torch's either
            used["ema_decay"] = ema_decay
        super().__init__(params, {**defaults, **used})

    # Made when first needed: they are in no pickle, and a subclass may call
    # Optimizer.__init__ itself.
    @cached_property
    def _stepper(self) -> _core.Stepper:
        stepper = _core.Stepper()
        stepper._set_storage(*self._storage)
        return stepper

    @cached_property
    def _lock(self) -> _Lock:
        return _Lock()

    @property
    def max_grad_norm(self) -> float | None:
        """The greatest norm that all gradients together may have; None for no limit."""
        return self._stepper.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if self._in_backward is not None:
            backward.check("max_grad_norm", value)
        self._stepper.max_grad_norm = value

    @property
    def nonfinite(self) -> Nonfinite:
        """What a step does with an infinite or NaN gradient."""
        return self._stepper.nonfinite

    @nonfinite.setter
    def nonfinite(self, value: Nonfinite) -> None:
        if self._in_backward is not None:
            backward.check("nonfinite", value)
        self._stepper.nonfinite = value

    @property
    def threads(self) -> int | None:
        """The greatest number of threads of a step; None for as many as torch uses."""
        return self._stepper.threads

    @threads.setter
    def threads(self, value: int | None) -> None:
        self._stepper.threads = value

    def _store(self, storage: Storage) -> None:
        self._stepper._set_storage(*storage)
        self._keep_storage(storage)

    @property
    def seed(self) -> int:
        """The seed of the random bits of rounding."""
        return self._stepper.seed

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
        self._stepper._check_trained("pickle")
        own = {key: getattr(self, key) for key in (*_OF_OPTIMIZER, "skipped_steps")}
        return {**super().__getstate__(), **own, "storage": tuple(self._storage)}

    def __repr__(self) -> str:
        # Torch's own, as long as no option of ours is used.
        options = {key: getattr(self, key) for key in _OF_OPTIMIZER}
        used = [
            f"{key}: {value}\n"
            for key, value in options.items()
            if value not in (None, "propagate")
        ]
        used += [f"{key}: {getattr(self, key)}\n" for key in self._unusual_storage()]
        return super().__repr__().removesuffix(")") + "".join(used) + ")"

    def __setstate__(self, state: dict[str, Any]) -> None:
        # From a pickle, or (only "state" and "param_groups") from load_state_dict.
        state = dict(state)
        if "storage" in state:
            self._store(Storage(*state.pop("storage")))
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
                    entry["step"] = fallback.count_of(entry["step"], p, group)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state and the options, as every torch optimizer does."""
        self._stepper._check_trained("state_dict")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what this class, ``torch.optim.RMSprop`` or ``rmsprop.RMSprop`` saved.

        Options that the checkpoint does not have stay as they are. As with every torch
        optimizer, tensors that need no other dtype or device are not copied; arrays are.
        """
        self._stepper._check_trained("load_state_dict")
        stored: list[tuple[Tensor, dict[str, Any]]] = []

        def take(_: Optimizer, checkpoint: dict[str, Any]) -> None:
            _take_arrays(checkpoint)
            stored.extend(self._stored(checkpoint))

        # After the hooks of others, which may make something else of a checkpoint.
        handle = self.register_load_state_dict_pre_hook(take)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for p, entry in stored:
            own = self.state[p]
            for key in [
                key for key in own if key.endswith(SCALE) or key == "error_bits"
            ]:
                del own[key]
            own.update(entry)

    def _stored(
        self, checkpoint: dict[str, Any]
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """What torch would load wrong of a checkpoint, as it is stored here."""
        indices = [
            index for group in checkpoint["param_groups"] for index in group["params"]
        ]
        params = [p for group in self.param_groups for p in group["params"]]
        if len(indices) != len(params):
            return []  # torch will say so
        found = []
        for place, (index, p) in enumerate(zip(indices, params)):
            entry = checkpoint["state"].get(index)
            is_stored = self._storage[:3] != Storage()[:3]
            if is_stored or torch_storage.needs_loading(p, entry):
                loaded = torch_storage.loaded(self._stepper, p, place, entry, self.seed)
                found.append((p, loaded))
        return found

    def init_state(self) -> None:
        """Makes all state now instead of at the first step, so that it can be shared before a fork.

        State that is there stays as it is. An average is the parameter as it is now.

        Example:
            >>> net = torch.nn.Linear(3, 1)
            >>> opt = RMSprop(net.parameters(), momentum=0.9)
            >>> opt.init_state()
            >>> for entry in opt.state.values():
            ...     for tensor in entry.values():
            ...         _ = tensor.share_memory_()
        """
        for group in self.param_groups:
            is_left = group["capturable"] or group["differentiable"]
            stepper = None if is_left else self._stepper
            for p in group["params"]:
                known = self.state.get(p, {})
                new = fallback.missing_state(stepper, p, known, group, begins=False)
                self.state[p].update(new)

    def float32_params(self) -> list[Tensor]:
        """Returns copies of the full values of the parameters, in their order.

        Those of 16 bits are widened, with their ``error_bits`` where they have any.

        Example:
            >>> net = torch.nn.Linear(3, 1, dtype=torch.bfloat16)
            >>> opt = RMSprop(net.parameters(), master_weight_bits=32)
            >>> [tuple(p.shape) for p in opt.float32_params()]
            [(1, 3), (1,)]
        """
        full = []
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.dtype not in (torch.float16, torch.bfloat16):
                full.append(p.detach().clone())
                continue
            error_bits = self.state.get(p, {}).get("error_bits")
            errors = None if error_bits is None else error_bits.numpy()
            full.append(torch.from_numpy(joined(as_ndarray(p), errors)))
        return full

    @staticmethod
    def float32_state(state_dict: dict[str, Any]) -> dict[str, Any]:
        """Returns a checkpoint that any RMSprop loads: the same with its state in float32.

        Error bits are left out: save :meth:`float32_params` beside it.
        """
        state = {
            index: torch_storage.float32_entry(entry)
            for index, entry in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def add_param_group(self, param_group: _Group) -> None:
        """Adds a group of parameters with options of its own; the others are defaults.

        Raises:
            TypeError, ValueError: as torch; ValueError for a bad value of an option that
                torch does not have. No group is added then.
        """
        self._stepper._check_trained("add_param_group")
        super().add_param_group(param_group)
        try:
            place = f" of group {len(self.param_groups) - 1}"
            _core.check_torch_options(param_group, place)
            fallback.check_new(self, param_group)
            if param_group.get("contiguous_params"):
                _flatten(param_group["params"])
            if self._in_backward is not None:
                last = len(self.param_groups) - 1
                self._in_backward.add(self.param_groups, [last])
        except BaseException:
            self.param_groups.pop()
            raise

    def _update(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs a step, without the hooks around it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    #: The same inside torch's own wrapper: hooks, and a range for the profiler.
    _update_hooked = Optimizer.profile_hook_step(_update)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Updates every parameter that has a gradient, in place.

        Writes the parameters and their state, not the gradients. The GIL is released
        while a long step computes; threads that step one optimizer take turns.

        Args:
            closure: called first, with gradients enabled; its value is returned.

        Raises:
            ValueError: for a tensor that only torch's own ``rmsprop`` takes, where an
                option is on that it does not have; nothing is changed then.
            FloatingPointError: with ``nonfinite="raise"``; nothing is changed then.
            RuntimeError: for a sparse gradient that is not ``sparse_coo``, or that torch's own
                ``rmsprop`` would have to take.
        """
        # torch's wrapper costs more than a small step: it is used when there is a need.
        if (
            args
            or kwargs
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_names.wants_wrapper()
            or self.found_inf is not None
            or self._in_backward is not None
        ):
            if self._in_backward is not None:
                self._in_backward.begin_update()
            if type(self).step is not _step:
                # torch has wrapped the step of a subclass, which called this one.
                return self._update(*args, **kwargs)
            if self.found_inf is not None and not self._unscale(self.found_inf):
                return None
            return self._update_hooked(*args, **kwargs)
        found = self._stepper.step(self.param_groups, self.state)
        if isinstance(found, list):
            self._step_odd(found)
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets the gradients to None, or to zero; as in torch."""
        if self._in_backward is not None:
            self._in_backward.begin_update()
        super().zero_grad(set_to_none)

    def averaged(self) -> AbstractContextManager[None]:
        """Returns a context in which the parameters hold their averages, in place.

        They have their own values again after it, also after an exception. A parameter
        without ``ema`` keeps its value. Inside, ``step``, ``state_dict``, ``load_state_dict``,
        ``add_param_group`` and ``averaged`` itself are RuntimeErrors.

        Example:
            >>> net = torch.nn.Linear(1, 1, bias=False)
            >>> opt = RMSprop(net.parameters(), ema_decay=0.9)
            >>> net(torch.ones(1)).backward()
            >>> opt.step()
            >>> with opt.averaged():
            ...     torch.equal(net.weight, opt.state[net.weight]["ema"])
            False
        """
        self._stepper._check_trained("averaged")
        return fallback.averaged(self)

    def step_in_backward(self) -> backward.Handle:
        """Steps each parameter inside the backward, as soon as its gradient is complete.

        Its gradient is None from then on, so that those of a model are never there all at
        once. The numbers are those of a step after the backward, bit for bit. Every backward
        is a step: gradients do not add up over several. It holds for all parameters, frozen
        ones and groups added later included, until the handle's ``remove()`` or the end of
        its ``with`` block; hooks do not keep the optimizer alive. Copies and pickles do not
        have it on.

        ``step`` may stay where it is: schedulers look for it, and it steps what else has a
        gradient. A second backward without ``step`` or ``zero_grad`` in between warns, once,
        for that is how gradients would be added up, or clipped. What is around it (step hooks, the range of the profiler, the ``step`` of a
        subclass) is not around steps in backward.

        Not for ``GradScaler`` and ``DistributedDataParallel``, which unscale and average
        gradients only later; of ``fully_shard`` the averaged ones are used.

        Returns:
            The handle.

        Raises:
            ValueError: if it is on already, or with ``max_grad_norm`` or ``nonfinite``, which
                need all gradients at once; nor can these be set while it is on.
            RuntimeError: for a parameter that is no leaf; from ``backward``, if the rest of it
                needs the value that a parameter had before its update.

            Whatever else ``step`` raises comes from ``backward``, at the parameter in
            question: those before it are updated.

        Example:
            >>> net = torch.nn.Linear(3, 1)
            >>> opt = RMSprop(net.parameters(), lr=0.01)
            >>> with opt.step_in_backward():
            ...     net(torch.ones(3)).sum().backward()
            >>> net.weight.grad is None, opt.state[net.weight]["step"].item()
            (True, 1.0)
        """
        if self._in_backward is not None:
            raise ValueError(
                "step_in_backward: expected it to be off, got it on: remove() its handle"
            )
        for option in backward.OFF:
            backward.check(option, getattr(self, option))
        self._in_backward = backward.Handle(self)
        return self._in_backward

    def _step(self, only: fallback.Place | None = None) -> None:
        """Steps all parameters or one, without hooks."""
        found: Any = []
        if not torch_names.is_watched():
            found = self._stepper.step(self.param_groups, self.state, only)
        if isinstance(found, list):
            self._step_odd(found, only)

    def _step_odd(self, odd: list[int], only: fallback.Place | None = None) -> None:
        """Performs a step of which something is not ordinary; threads take turns."""
        if self._lock.process != os.getpid():
            self._lock = _Lock()
        turn = self._lock.turn
        had_to_wait = not turn.acquire(blocking=False)
        if had_to_wait:
            turn.acquire()
            # Whoever had the turn may have made the state that was missing.
            odd = []
        try:
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                fallback.step(self, only, odd)
        finally:
            turn.release()

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
            self._stepper.skipped_steps += 1
        return is_finite


# torch wraps a step that is not `hooked`.
_step: Any = RMSprop.step
_step.hooked = True
_step.__signature__ = inspect.signature(RMSprop._update)
for _function in (_step, RMSprop._update_hooked):
    torch_names.skip_compiling(_function, "a step of rmsprop is compiled already")


def _flatten(params: list[Tensor]) -> None:
    """Moves parameters next to each other."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        members = [p for p in params if p.dtype == dtype and _is_movable(p)]
        shared = Counter(p.untyped_storage().data_ptr() for p in members)
        members = [p for p in members if shared[p.untyped_storage().data_ptr()] == 1]
        numel = sum(p.numel() for p in members)
        flat = torch.empty(numel, dtype=dtype, device="cpu")
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
    return p.untyped_storage().nbytes() == p.nbytes and not p.is_shared()


def _take_arrays(state_dict: dict[str, Any]) -> None:
    """Copies the NumPy arrays of a checkpoint into tensors."""
    state_dict["state"] = {
        key: {name: torch_storage.tensor_of(value) for name, value in entry.items()}
        if isinstance(entry, dict)
        else entry
        for key, entry in state_dict["state"].items()
    }
