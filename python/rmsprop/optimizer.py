"""RMSprop over arrays, and every framework's variant by name."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast, overload

import numpy as np

from rmsprop import _core
from rmsprop.average import averaged
from rmsprop.state import State, as_ndarray, checked, copied, restore
from rmsprop.storage import HasStorage, Storage, float32_entry, joined

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from typing_extensions import Self, Unpack

    from rmsprop.types import (
        Dialect,
        DialectOptions,
        Nonfinite,
        Overrides,
        Params,
        Rounding,
        StateDType,
    )

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_core._after_fork)

#: Keyword arguments that a dialect leaves to the caller, in either front.
_FREE = {
    *("lr", "maximize", "max_grad_norm", "nonfinite", "contiguous_params", "threads"),
    *("capturable", "foreach", "differentiable"),
    *("cautious_weight_decay", "corrected_weight_decay", "clip_weights"),
    "ema_decay",
    *Storage._fields,
}


def dialect(name: Dialect, **overrides: Unpack[Overrides]) -> DialectOptions:
    """Returns the keyword arguments that make RMSprop that of a framework.

    They spell out the whole formula, so both fronts read them alike, but never ``lr``
    unless it is given: the learning rate is yours.

    Args:
        name: oneflow, torch, timm, sb3, keras, tf1, optax, paddle, mlx, graves,
            mindspore, chainer, burn, dfdx or dqn.
        **overrides: arguments of the optimizer that replace or complete them.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an override that is no argument of the optimizer.

    Example:
        >>> w = np.ones(3, np.float32)
        >>> opt = RMSprop([w], lr=7e-4, **dialect("tf1", momentum=0.9))
        >>> opt.param_groups[0]["initial_square_avg"]
        1.0
    """
    if not isinstance(name, str):
        raise TypeError(f"dialect: expected a name, got {type(name).__name__}")
    options = _core.dialect(name)
    for key in overrides:
        if key not in options and key not in _FREE:
            meant = _core.meant_by(key)
            hint = f" (did you mean {meant}?)" if meant else ""
            raise TypeError(
                f"dialect: expected an argument of RMSprop, got {key!r}{hint}"
            )
    # With lr and the like if they are given, of which a type checker need not know.
    return cast("DialectOptions", {**options, **overrides})


_Value = TypeVar("_Value")


class _Hyperparameter(Generic[_Value]):
    """An option of all groups at once."""

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, opt: None, _: type) -> Self: ...
    @overload
    def __get__(self, opt: RMSprop, _: type) -> _Value: ...
    def __get__(self, opt: RMSprop | None, _: type) -> Self | _Value:
        if opt is None:
            return self
        found = [group[self._name] for group in opt.param_groups]
        if any(value != found[0] for value in found):
            raise ValueError(
                f"{self._name}: expected one value for all groups, got {found}:"
                " param_groups has that of each"
            )
        value: _Value = found[0]
        return value

    def __set__(self, opt: RMSprop, value: _Value) -> None:
        for index, group in enumerate(opt.param_groups):
            _core.check_options({**group, self._name: value}, f" of group {index}")
        for group in opt.param_groups:
            group[self._name] = value


class RMSprop(HasStorage, _core.Optimizer):
    """RMSprop that updates arrays in place, in one fused pass.

    The rule is in the documentation of :mod:`rmsprop`; the defaults are OneFlow's.
    Parameters are writable arrays of float16, bfloat16, float32 or float64 in host memory,
    of any shape and strides: NumPy arrays, :class:`rmsprop.Parameter`, buffers, or DLPack
    tensors. They are never copied. Those of 16 bits compute in float32, as does their state.
    Gradients have the parameter's shape, and its dtype or another of these, and are read
    only. A gradient of some rows is a tuple of their indices, in any order and more than once,
    and their values: the other rows, their state included, stay as they are. The state (one array a parameter, more with ``centered`` and ``momentum``) is
    allocated here, and nothing that grows with it later.

    The arrays are trained themselves: write into them, for ``params["w"] = x`` leaves the
    optimizer with the old one. An optimizer that is pickled or copied apart from its
    arrays trains copies of them.

    Threads that step one optimizer take turns; different optimizers run at the same
    time. After ``fork`` a child steps on threads of its own.

    Args:
        params: parameters, ``(name, parameter)`` pairs or dicts of a group (with the
            key ``"params"``), in any iterable, or a mapping from name to parameter.
        lr: learning rate, per step.
        alpha: decay of the averages, from 0 to 1.
        eps: keeps the divisor away from 0; in units of the squared gradient, or with
            ``eps_in_sqrt=False`` of the gradient.
        weight_decay: L2 penalty, or with ``decoupled_weight_decay`` a shrinking of the
            parameter by ``lr * weight_decay``.
        momentum: decay of the momentum buffer; 0 is off.
        centered: divides by the standard deviation of the gradient instead of its root
            mean square. A variance that rounding made negative counts as 0.
        contiguous_params: moves the parameters of one dtype in a group into one flat
            buffer (only :class:`rmsprop.Parameter` can be moved), and their gradients
            if all have one. A step then costs the same for one tensor and for ten
            thousand, as long as gradients are written in place (``p.grad[...] = g``)
            and the arrays' flags are left alone.
        eps_in_sqrt: ``sqrt(v + eps)`` instead of ``sqrt(v) + eps``.
        initial_square_avg: the value that ``square_avg`` starts at.
        lr_in_momentum: the buffer holds steps instead of scaled gradients.
        nesterov: Nesterov's momentum.
        bias_correction: divides both averages by ``1 - alpha**t``. With ``centered``
            the first step divides by rounding noise: choose ``eps`` accordingly.
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
        maximize: climbs.
        max_grad_norm: scales all gradients together by
            ``min(1, max_grad_norm / (norm + 1e-6))``, norm the L2 norm over every
            gradient of every group; the gradients are not written.
        nonfinite: ``"propagate"``; ``"skip"``: a step with an infinite or NaN gradient
            changes nothing and adds to ``skipped_steps``; ``"raise"``.
        threads: at most so many threads. None: ``RMSPROP_NUM_THREADS``, or as many as
            the process may use. Small steps stay on the caller.
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
        TypeError: something is not an array of a supported dtype, or not a number.
        ValueError: something is out of range, read-only, unaligned, overlapping, not in
            host memory, or named twice. The message names it.

    Guarantees: the same bits for every instruction set, number of threads, alignment
    and kind of input (``tests/test_bits.py``); an error leaves everything as it was
    (``tests/test_bad_input.py``).

    Example:
        >>> w, b = np.ones((2, 3), np.float32), np.zeros(3, np.float32)
        >>> opt = RMSprop({"w": w, "b": b}, lr=0.01)
        >>> opt.step(grads={"w": np.ones_like(w), "b": None})
        >>> bool((w < 1).all()), b.tolist()
        (True, [0.0, 0.0, 0.0])

    Source: Tieleman and Hinton 2012; OneFlow 1.0 ``oneflow.optim.RMSprop``.
    """

    #: Whether row-sparse gradients are taken.
    support_sparse = True

    defaults: dict[str, Any]

    # Each reads the value that all groups have (ValueError where they differ), and sets it in
    # every group, from the next step on.
    lr = _Hyperparameter[float]()
    alpha = _Hyperparameter[float]()
    eps = _Hyperparameter[float]()
    weight_decay = _Hyperparameter[float]()
    momentum = _Hyperparameter[float]()
    centered = _Hyperparameter[bool]()
    eps_in_sqrt = _Hyperparameter[bool]()
    initial_square_avg = _Hyperparameter[float]()
    lr_in_momentum = _Hyperparameter[bool]()
    nesterov = _Hyperparameter[bool]()
    bias_correction = _Hyperparameter[bool]()
    decoupled_weight_decay = _Hyperparameter[bool]()
    cautious_weight_decay = _Hyperparameter[bool]()
    corrected_weight_decay = _Hyperparameter[bool]()
    clip_weights = _Hyperparameter["float | None"]()
    ema_decay = _Hyperparameter["float | None"]()
    maximize = _Hyperparameter[bool]()

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        contiguous_params: bool = False,
        *,
        eps_in_sqrt: bool = True,
        initial_square_avg: float = 0.0,
        lr_in_momentum: bool = True,
        nesterov: bool = False,
        bias_correction: bool = False,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        cautious_weight_decay: bool = False,
        corrected_weight_decay: bool = False,
        clip_weights: float | None = None,
        ema_decay: float | None = None,
        max_grad_norm: float | None = None,
        nonfinite: Nonfinite = "propagate",
        threads: int | None = None,
        state_dtype: StateDType = None,
        rounding: Rounding = "nearest",
        master_weight_bits: int | None = None,
        seed: int = 0,
    ) -> None:
        self.defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "contiguous_params": contiguous_params,
            "eps_in_sqrt": eps_in_sqrt,
            "initial_square_avg": initial_square_avg,
            "lr_in_momentum": lr_in_momentum,
            "nesterov": nesterov,
            "bias_correction": bias_correction,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "cautious_weight_decay": cautious_weight_decay,
            "corrected_weight_decay": corrected_weight_decay,
            "clip_weights": clip_weights,
            "ema_decay": ema_decay,
        }
        _core.check_options(self.defaults, "")
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.threads = threads
        self._store(Storage(state_dtype, rounding, master_weight_bits, seed))
        groups = list(_groups_in(params))
        if not any(objects for _, objects, _ in groups):
            raise ValueError("params: expected at least one parameter, got none")
        self._add(groups)
        if any(_is_torch_parameter(p) for _, objects, _ in groups for p in objects):
            warnings.warn(
                "params: torch's modules are stepped here with OneFlow's defaults, and its"
                " schedulers do not take this class: rmsprop.torch.RMSprop is the one for them",
                UserWarning,
                stacklevel=2,
            )

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Adds a group: a mapping with the key ``"params"`` and options of its own.

        Missing options come from ``defaults``; the mapping is left alone.

        Raises:
            TypeError, ValueError: as the constructor; the optimizer is unchanged.

        Example:
            >>> opt = RMSprop([np.ones(2)])
            >>> opt.add_param_group({"params": [np.ones(3)], "lr": 0.1})
            >>> len(opt.param_groups)
            2
        """
        if not isinstance(group, Mapping):
            raise TypeError(
                f"group: expected a mapping with the key 'params',"
                f" got {type(group).__name__}"
            )
        self._add([_group_in(group)])

    def _add(self, groups: list[_Group]) -> None:
        """Completes groups from the defaults and adds them, all or none."""
        self._check_trained("add_param_group")
        complete = []
        for options, objects, names in groups:
            names = [
                p.name if name is None and isinstance(p, _core.Parameter) else name
                for p, name in zip(objects, names)
            ]
            group = {"params": tuple(objects), **self.defaults, **options}
            if objects and None not in names:
                group["param_names"] = list(names)
            complete.append((group, names))
        self._add_groups(complete)

    def _store(self, storage: Storage) -> None:
        self._set_storage(*storage)
        self._keep_storage(storage)

    @property
    def state(self) -> State:
        """The state by parameter index over all groups: a mapping of mappings.

        Example:
            >>> opt = RMSprop([np.ones(2)])
            >>> opt.state[0]["step"], opt.state[0]["square_avg"].tolist()
            (0, [0.0, 0.0])
        """
        return State(self)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zeroes the gradients in place, or sets them to None.

        Parameters without ``.grad`` are left alone. A read-only gradient (a JAX array)
        is replaced by an array of zeros.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if getattr(p, "grad", None) is None:
                    continue
                if set_to_none or isinstance(p.grad, tuple):
                    p.grad = None
                    continue
                array = _grad_array(p)
                if array.flags.writeable:
                    array[...] = 0
                else:
                    p.grad = np.zeros_like(array)

    def clip_grad(self, error_if_nonfinite: bool = False) -> list[float]:
        """Clips the gradients of each group that asks for it, in place.

        A group asks with ``clip_grad_max_norm`` and ``clip_grad_norm_type`` (any p,
        inf, -inf or 0). Over the parameters of the group that have a gradient::

            norm = the p-norm of the p-norms of the gradients
            grad *= min(1, max_norm / (norm + 1e-6))

        NaN and infinities spread as in torch's ``clip_grad_norm_``. A read-only gradient
        (a JAX array) is replaced by a scaled array.

        Returns:
            One norm for each group that asks.

        Raises:
            RuntimeError: with ``error_if_nonfinite``, if a norm is infinite or NaN;
                nothing is scaled then, in any group.

        Source: OneFlow 1.0 ``Optimizer.clip_grad``, torch 2 ``clip_grad_norm_``.
        """
        clips = []
        for index, group in enumerate(self.param_groups):
            if "clip_grad_max_norm" in group and "clip_grad_norm_type" in group:
                max_norm = _number(group, "clip_grad_max_norm", index)
                order = _number(group, "clip_grad_norm_type", index)
                if max_norm < 0:
                    raise ValueError(
                        f"clip_grad_max_norm of group {index}: expected a number >= 0,"
                        f" got {max_norm}"
                    )
                params = [
                    p for p in group["params"] if getattr(p, "grad", None) is not None
                ]
                arrays = [_grad_array(p) for p in params]
                norm = _norm(arrays, order)
                if error_if_nonfinite and not np.isfinite(norm):
                    raise RuntimeError(
                        f"group {index}: expected a finite gradient norm of order"
                        f" {order}, got {norm}"
                    )
                clips.append((params, arrays, norm, max_norm / (norm + 1e-6)))
        with np.errstate(all="ignore"):
            for params, arrays, _, factor in clips:
                for p, array in zip(params, arrays):
                    if array.flags.writeable:
                        np.multiply(array, 1.0 if factor > 1 else factor, out=array)
                    elif factor <= 1 or np.isnan(factor):
                        p.grad = array * array.dtype.type(factor)
        return [norm for _, _, norm, _ in clips]

    def averaged(self) -> AbstractContextManager[None]:
        """Returns a context in which the parameters hold their averages, in place.

        They have their own values again after it, also after an exception. A parameter
        without ``ema`` keeps its value. Inside, ``step``, ``state_dict``, ``load_state_dict``,
        ``add_param_group`` and ``averaged`` itself are RuntimeErrors.

        Example:
            >>> w = np.ones(2)
            >>> opt = RMSprop([w], lr=0.1, ema_decay=0.5)
            >>> opt.step(grads=[np.ones(2)])
            >>> with opt.averaged():
            ...     print(w)
            [0.50000005 0.50000005]
            >>> w
            array([9.99999950e-08, 9.99999950e-08])
        """
        self._check_trained("averaged")
        params = [p for group in self.param_groups for p in group["params"]]
        entries = self.state.values()
        pairs = [
            (p, entry["ema"]) for p, entry in zip(params, entries) if "ema" in entry
        ]
        torch = sys.modules.get("torch")
        tensors = [p for p, _ in pairs if torch and isinstance(p, torch.Tensor)]
        return averaged(self, [(as_ndarray(p), ema) for p, ema in pairs], tensors)

    def float32_params(self) -> list[np.ndarray]:
        """Returns copies of the full values of the parameters, in their order.

        Those of 16 bits are widened, with their ``error_bits`` where they have any.

        Example:
            >>> w = np.ones(2, np.float16)
            >>> RMSprop([w]).float32_params()
            [array([1., 1.], dtype=float32)]
        """
        params = [p for group in self.param_groups for p in group["params"]]
        entries = self.state.values()
        return [
            joined(as_ndarray(p), entry.get("error_bits"))
            for p, entry in zip(params, entries)
        ]

    @staticmethod
    def float32_state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a checkpoint that any RMSprop loads: the same with its state in float32.

        Error bits are left out: save :meth:`float32_params` beside it.

        Example:
            >>> opt = RMSprop([np.ones(2, np.float32)], state_dtype="bfloat16")
            >>> RMSprop.float32_state(opt.state_dict())["state"][0]["square_avg"]
            array([0., 0.], dtype=float32)
        """
        state = {
            index: float32_entry(entry) for index, entry in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state and the options, in torch's shape; arrays are copies.

        Example:
            >>> sorted(RMSprop([np.ones(2)]).state_dict())
            ['param_groups', 'state']
        """
        self._check_trained("state_dict")
        state = {
            index: {key: copied(value) for key, value in entry.items()}
            for index, entry in self.state.items()
        }
        return {"state": state, "param_groups": numbered(self.param_groups)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` or torch's RMSprop saved; arrays are copied.

        Where both sides have names for all parameters, state goes by name, else by
        position. Options that are missing come from ``defaults``, state that is missing
        goes back to its start. ``contiguous_params``, the names, and keys of a group that are no
        options and not in the checkpoint (``clip_grad_max_norm``) stay as they are here. A
        checkpoint of another framework says nothing of its dialect: make the optimizer
        with that dialect first, as ``RMSprop(params, **dialect("torch"))``.

        Raises:
            ValueError: for another layout of groups, other names, or state that does not
                fit; the optimizer is unchanged then.
        """
        self._take(self._checked_state_dict(state_dict))

    def _checked_state_dict(self, state_dict: Mapping[str, Any]) -> _Loaded:
        self._check_trained("load_state_dict")
        try:
            saved_groups = list(state_dict["param_groups"])
            saved_state = dict(state_dict["state"])
            sizes = [len(group["params"]) for group in saved_groups]
            numbers = [n for group in saved_groups for n in group["params"]]
            places = {number: index for index, number in enumerate(numbers)}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "state_dict: expected {'state': ..., 'param_groups': [{'params': ...},"
                f" ...]}}, got {type(state_dict).__name__} ({error!r})"
            ) from None
        wanted = [len(group["params"]) for group in self.param_groups]
        if sizes != wanted:
            raise ValueError(
                f"state_dict: expected groups of {wanted} parameters, got {sizes}"
            )
        if len(places) != len(numbers):
            raise ValueError(f"state_dict: expected each parameter once, got {numbers}")
        unknown = [number for number in saved_state if number not in places]
        if unknown:
            raise ValueError(
                f"state_dict: expected state of parameters {numbers}, got {unknown}"
            )
        places = self._by_name(places, saved_groups)
        kept = ("params", "param_names", "contiguous_params")
        groups = []
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups)):
            own = {key: group[key] for key in kept if key in group}
            new = {**self.defaults, **saved}
            new = {key: value for key, value in new.items() if key not in kept} | own
            _check_loaded(new, f" of group {index} in state_dict")
            groups.append(new)
        entries = {
            places[number]: checked(self, places[number], entry)
            for number, entry in saved_state.items()
        }
        return _Loaded(places, groups, entries)

    def _take(
        self,
        loaded: _Loaded,
        written: Iterable[tuple[np.ndarray, np.ndarray]] = (),
    ) -> None:
        entries = {index: loaded.entries.get(index, {}) for index in self.state}
        restore(self, entries, loaded.groups, written)

    def _by_name(
        self, places: dict[Any, int], saved_groups: list[Mapping[str, Any]]
    ) -> dict[Any, int]:
        """Where the parameters of a checkpoint go if both sides have names for all."""
        own = names_in(self.param_groups)
        saved = names_in(saved_groups)
        if own is None or saved is None or len(saved) != len(places):
            return places
        if set(own) != set(saved):
            raise ValueError(
                "state_dict: expected parameters of the same names, got"
                f" {sorted(set(saved) - set(own))} for {sorted(set(own) - set(saved))}"
            )
        found = {name: index for index, name in enumerate(own)}
        return {number: found[name] for number, name in zip(places, saved)}

    def __getstate__(self) -> dict[str, Any]:
        options = {key: getattr(self, key) for key in _OPTIMIZER_OPTIONS}
        return {
            "attributes": dict(self.__dict__),
            "options": options,
            "storage": self._storage,
            "param_groups": [dict(group) for group in self.param_groups],
            "state": self.state_dict()["state"],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state["attributes"])
        self._store(state["storage"])
        for key, value in state["options"].items():
            setattr(self, key, value)
        self._add_groups(
            [
                (group, list(group.get("param_names", [None] * len(group["params"]))))
                for group in state["param_groups"]
            ]
        )
        saved = state["state"].items()
        restore(self, {index: checked(self, index, entry) for index, entry in saved})

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for index, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {index}")
            lines += [
                f"    {key}: {group[key]}"
                for key in sorted(group)
                if key not in ("params", "param_names")
            ]
        options = ["max_grad_norm", "nonfinite", "threads", *self._unusual_storage()]
        lines += [f"{key}: {getattr(self, key)}" for key in options]
        return "\n".join([*lines, ")"])


class _Loaded(NamedTuple):
    """A checkpoint that was checked, and fits."""

    places: dict[Any, int]  # the index here of each parameter there
    groups: list[dict[str, Any]]
    entries: dict[int, dict[str, Any]]


def numbered(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with the indices of their parameters in place of these."""
    result, first = [], 0
    for group in groups:
        end = first + len(group["params"])
        result.append({**group, "params": list(range(first, end))})
        first = end
    return result


_OPTIMIZER_OPTIONS = ("max_grad_norm", "nonfinite", "threads", "skipped_steps")

#: A group as given: its options, its parameters, and their names.
_Group = tuple[dict[str, Any], list[Any], list["str | None"]]


def _groups_in(params: Any) -> Iterator[_Group]:
    """Sorts out what a constructor was given; a generator is read once."""
    if isinstance(params, Mapping):
        if "params" in params:
            yield _group_in(params)
        else:
            yield {}, *_named(params)
        return
    items = _listed(params)
    if any(isinstance(item, Mapping) for item in items):
        for index, item in enumerate(items):
            if not isinstance(item, Mapping):
                raise TypeError(
                    f"params: expected dicts of groups only,"
                    f" got {type(item).__name__} at {index}"
                )
            yield _group_in(item)
        return
    yield {}, *_named(items)


def _group_in(group: Mapping[str, Any]) -> _Group:
    """Sorts out one group."""
    if "params" not in group:
        raise ValueError(f"group: expected the key 'params', got {sorted(group)}")
    options = {key: value for key, value in group.items() if key != "params"}
    given = options.pop("param_names", None)
    params = group["params"]
    if _is_parameter(params):
        params = [params]
    objects, names = _named(params if isinstance(params, Mapping) else _listed(params))
    if given is not None:
        if not isinstance(given, (list, tuple)) or not all(
            isinstance(name, str) for name in given
        ):
            raise TypeError(f"param_names: expected a list of str, got {given!r}")
        if len(given) != len(objects):
            raise ValueError(
                f"param_names: expected {len(objects)} names, got {len(given)}"
            )
        names = list(given)
    return options, objects, names


def _named(params: Mapping[str, Any] | list[Any]) -> tuple[list[Any], list[str | None]]:
    """Parameters and their names, None where there is none."""
    if isinstance(params, Mapping):
        params = list(params.items())
    objects: list[Any] = []
    names: list[str | None] = []
    for item in params:
        name = None
        if isinstance(item, tuple):
            if len(item) != 2 or not isinstance(item[0], str):
                raise TypeError(
                    f"parameter {len(objects)}: expected an array or a pair of name"
                    f" and array, got a tuple of {len(item)}"
                )
            name, item = item
        if isinstance(item, Mapping):
            culprit = len(objects) if name is None else f"{len(objects)} ({name!r})"
            raise TypeError(
                f"parameter {culprit}: expected an array, got a {type(item).__name__}:"
                " make of a nested mapping one from path to array"
            )
        objects.append(item)
        names.append(name)
    return objects, names


def _listed(params: Any) -> list[Any]:
    """What an iterable yields, unless it is an array or a string."""
    wrong = TypeError(
        f"params: expected an iterable of arrays, got {type(params).__name__}"
    )
    if isinstance(params, (str, bytes)) or _is_parameter(params):
        raise wrong
    try:
        items = iter(params)
    except TypeError:
        raise wrong from None
    return list(items)


def _is_parameter(item: Any) -> bool:
    """Whether it is a bare array, which is itself iterable more often than not."""
    if isinstance(item, (np.ndarray, np.generic, _core.Parameter)):
        return True
    if hasattr(type(item), "__dlpack__"):
        return True
    if isinstance(item, Iterable) and not isinstance(item, (list, tuple, set, dict)):
        try:
            memoryview(item)  # type: ignore[arg-type]
        except TypeError:
            return False
        return True
    return False


def names_in(groups: Iterable[Mapping[str, Any]]) -> list[str] | None:
    """The names of all parameters, or None if some have none."""
    names: list[str] = []
    for group in groups:
        if not group["params"]:
            continue
        if "param_names" not in group:
            return None
        names += group["param_names"]
    return names


def _is_torch_parameter(item: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(item, torch.nn.Parameter)


def _check_loaded(options: dict[str, Any], place: str) -> None:
    """As the core's check, but what is wrong with a checkpoint is a ValueError."""
    try:
        _core.check_options(options, place)
    except TypeError as error:
        raise ValueError(str(error)) from None


def _number(group: dict[str, Any], key: str, index: int) -> float:
    """A number that is not NaN, also as a string such as "inf"."""
    try:
        value = float(group[key])
    except (TypeError, ValueError):
        value = math.nan
    if math.isnan(value):
        raise ValueError(
            f"{key} of group {index}: expected a number, got {group[key]!r}"
        )
    return value


def _grad_array(parameter: Any) -> np.ndarray:
    """The gradient of a parameter, of which there is one, as an array of floats."""
    grad, name = parameter.grad, getattr(parameter, "name", None)
    culprit = "grad" if name is None else f"grad of {name!r}"
    try:
        array = as_ndarray(grad)
    except (TypeError, BufferError):
        raise TypeError(
            f"{culprit}: expected an array, got {type(grad).__name__}"
        ) from None
    if array.dtype.kind != "f":
        raise TypeError(f"{culprit}: expected an array of floats, got {array.dtype}")
    return array


def _norm(arrays: list[np.ndarray], order: float) -> float:
    """The norm of the norms, each computed in float64."""
    if not arrays:
        return 0.0
    with np.errstate(all="ignore"):
        norms = [
            np.linalg.norm(array.ravel().astype(np.float64, copy=False), order)
            for array in arrays
            if array.size
        ]
        return float(np.linalg.norm(norms, order)) if norms else 0.0
