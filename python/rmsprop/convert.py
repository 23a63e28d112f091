"""Checkpoints of other frameworks, from there and to there; none of them is imported.

What comes from there is a ``state_dict`` for :meth:`rmsprop.RMSprop.load_state_dict` or
that of :class:`rmsprop.torch.RMSprop`: the state under our names and the whole formula in
the options, so that the next step is the one that the framework would have made. What goes
there is made from such a ``state_dict``, and refused if that framework's RMSprop would
compute something else. Arrays are read as NumPy does; the parameters themselves are yours
to carry over.

========  =============================================  ==============================
from, to  hyperparameters there                          state there
========  =============================================  ==============================
keras     learning_rate, rho, momentum, epsilon,         velocity, momentum,
          centered, weight_decay                         average_gradient
optax     learning_rate, decay, eps, initial_scale,      nu, mu, trace (the negative of
          eps_in_sqrt, centered, momentum, nesterov,     ``momentum_buffer``)
          bias_correction
tf1       learning_rate, decay, momentum, epsilon,       rms, mg, momentum
          centered
timm      torch's, decoupled_decay, lr_in_momentum,      torch's
          corrected_weight_decay
paddle    learning_rate, rho, epsilon, momentum,         mean_square, mean_grad,
          centered, weight_decay                         momentum
oneflow   lr, alpha, eps, weight_decay, centered         square_avg, grad_avg
========  =============================================  ==============================

Source: Keras 3.15, Optax 0.2.8, TensorFlow 2.21 (``tf.compat.v1``), timm 1.0.31, PaddlePaddle
3.3, OneFlow 1.0.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rmsprop import _core, storage
from rmsprop.optimizer import names_in
from rmsprop.state import as_ndarray

__all__ = [
    "arguments",
    "from_keras",
    "from_oneflow",
    "from_optax",
    "from_paddle",
    "from_tf1",
    "from_timm",
    "to_keras",
    "to_oneflow",
    "to_optax",
    "to_paddle",
    "to_tf1",
    "to_timm",
]

StateDict = dict[str, Any]
#: The names of a framework's parameters in the order of ours, or by our names.
Names = Sequence[str] | Mapping[str, str]


class _Peer(NamedTuple):
    """What a framework calls things: theirs -> ours."""

    options: dict[str, str]
    state: dict[str, str]


def _same(names: str) -> dict[str, str]:
    return {name: name for name in names.split()}


_TORCH_STATE = _same("square_avg grad_avg momentum_buffer")
_RATE_AND_RHO = {"learning_rate": "lr", "rho": "alpha", "epsilon": "eps"}
_RATE_AND_DECAY = {"learning_rate": "lr", "decay": "alpha"}
_PEERS = {
    "keras": _Peer(
        _RATE_AND_RHO | _same("momentum centered weight_decay"),
        {
            "velocity": "square_avg",
            "momentum": "momentum_buffer",
            "average_gradient": "grad_avg",
        },
    ),
    "optax": _Peer(
        _RATE_AND_DECAY
        | {"initial_scale": "initial_square_avg"}
        | _same("eps eps_in_sqrt centered momentum nesterov bias_correction"),
        {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer"},
    ),
    "tf1": _Peer(
        _RATE_AND_DECAY | {"epsilon": "eps"} | _same("momentum centered"),
        {"rms": "square_avg", "mg": "grad_avg", "momentum": "momentum_buffer"},
    ),
    "timm": _Peer(
        _same("lr alpha eps weight_decay momentum centered lr_in_momentum")
        | {"decoupled_decay": "decoupled_weight_decay"}
        | _same("corrected_weight_decay"),
        _TORCH_STATE,
    ),
    "paddle": _Peer(
        _RATE_AND_RHO | _same("momentum centered weight_decay"),
        {
            "momentum": "momentum_buffer",
            "mean_square": "square_avg",
            "mean_grad": "grad_avg",
        },
    ),
    "oneflow": _Peer(_same("lr alpha eps weight_decay centered"), _TORCH_STATE),
}

_FLAGS = {
    *("centered", "eps_in_sqrt", "nesterov", "bias_correction"),
    *("decoupled_weight_decay", "corrected_weight_decay", "lr_in_momentum"),
}
#: Options that no dialect fixes, as they are when they are off.
_OFF = {
    "maximize": False,
    "cautious_weight_decay": False,
    "corrected_weight_decay": False,
    "clip_weights": None,
    "ema_decay": None,
}


def arguments(name: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments of a framework's RMSprop for the options of ours.

    Args:
        name: keras, optax, tf1, timm, paddle or oneflow.
        state_dict: of an optimizer whose groups have the same options.

    Raises:
        ValueError: for an unknown name, groups that differ, or options that make a rule
            which that framework does not have.

    Example:
        >>> opt = rmsprop.RMSprop([np.ones(3)], **rmsprop.dialect("tf1"))
        >>> arguments("tf1", opt.state_dict())["decay"]
        0.9
    """
    peer = _peer(name)
    group, *others = _groups(name, state_dict)
    found = {
        theirs: group[ours] for theirs, ours in peer.options.items() if ours in group
    }
    for other in others:
        for theirs, ours in peer.options.items():
            if other.get(ours) != group.get(ours):
                raise ValueError(
                    f"{ours}: expected one value for all groups, for {name} has one"
                    f" {theirs}, got {group.get(ours)} and {other.get(ours)}"
                )
    if name == "optax" and not found.get("momentum"):
        found["momentum"] = None  # 0.0 is a buffer there
    return found


def from_keras(
    variables: Mapping[str, Any] | Iterable[Any], config: Mapping[str, Any]
) -> StateDict:
    """Reads an optimizer of Keras 3: ``keras.optimizers.RMSprop``.

    Args:
        variables: ``optimizer.variables``, or arrays by their ``path``, or by "0", "1"…
            as in ``optimizer/vars`` of a ``.weights.h5``.
        config: ``optimizer.get_config()``.

    Returns:
        A ``state_dict`` without names; parameters are in the order of Keras's
        ``trainable_variables``.

    Raises:
        ValueError: if something is missing or unknown, or the config clips, averages or
            accumulates, which our rule does not.
    """
    for key in (
        *("clipnorm", "clipvalue", "global_clipnorm", "use_ema"),
        *("loss_scale_factor", "gradient_accumulation_steps"),
    ):
        if config.get(key):
            raise ValueError(
                f"keras: expected no {key}, which is no part of our rule, got"
                f" {config[key]}: do without it, and take it out of config"
            )
    known = _PEERS["keras"].options
    options = _options("keras", {k: v for k, v in config.items() if k in known})
    items = _keras_items(variables)
    if not items:
        raise ValueError("keras: expected the variables of an optimizer, got none")
    used = _state_in_use(options)
    roles = {v: k for k, v in _PEERS["keras"].state.items() if v in used}
    arrays: dict[str, list[Any]] = {role: [] for role in roles.values()}
    step = 0
    if all(path.isdigit() for path, _ in items):
        values = [value for _, value in sorted(items, key=lambda item: int(item[0]))]
        step, rest = int(_array(values[0])), values[1:]
        lr = np.float32(options.get("lr", np.nan))
        # It is there unless the learning rate is a schedule.
        if rest and np.shape(rest[0]) == () and np.float32(rest[0]) == lr:
            rest = rest[1:]
        count = len(rest) // len(roles)
        for place, role in enumerate(arrays):
            arrays[role] = rest[place * count : (place + 1) * count]
    else:
        for path, value in items:
            role = _keras_role(path)
            if role == "iteration":
                step = int(_array(value))
            elif role in arrays:
                arrays[role].append(value)
            elif role != "learning_rate":
                raise ValueError(
                    f"keras: expected variables of {sorted(arrays)}, got {path!r}"
                )
    state = {ours: arrays[theirs] for ours, theirs in roles.items()}
    return _state_dict("keras", options, state, step)


def to_keras(state_dict: Mapping[str, Any], variables: Iterable[Any]) -> list[Any]:
    """Returns the values of an optimizer's variables in Keras 3, in their order.

    Args:
        state_dict: of an optimizer with the rule of Keras.
        variables: ``optimizer.variables`` of ``RMSprop(**arguments("keras", state_dict))``
            after ``optimizer.build(trainable_variables)``; each is then to
            ``assign`` its value.

    Raises:
        ValueError: for another rule, or variables that do not fit.
    """
    lr = arguments("keras", state_dict)["learning_rate"]
    entries = _entries(state_dict)
    ours = _PEERS["keras"].state
    taken = dict.fromkeys(ours, 0)
    values: list[Any] = []
    for path, variable in _keras_items(variables):
        role = _keras_role(path)
        if role == "iteration":
            values.append(np.int64(max(entry.get("step", 0) for entry in entries)))
        elif role == "learning_rate":
            values.append(np.float64(lr))
        elif role in ours:
            place, taken[role] = taken[role], taken[role] + 1
            entry = entries[place] if place < len(entries) else {}
            values.append(_fitting(path, _value(entry, ours[role], path), variable))
        else:
            raise ValueError(f"keras: expected variables of RMSprop, got {path!r}")
    _check_count("keras", taken["velocity"], len(entries))
    return values


def from_optax(opt_state: Any, **hyperparameters: Any) -> StateDict:
    """Reads the state of ``optax.rmsprop``, also inside ``inject_hyperparams``.

    Args:
        opt_state: what ``init`` and ``update`` return.
        **hyperparameters: the arguments that ``optax.rmsprop`` was called with.

    Returns:
        A ``state_dict`` whose parameters are named by their paths in the pytree, as
        ``"dense/kernel"``.

    Raises:
        TypeError: for an unknown hyperparameter.
        ValueError: for the state of something else, such as a chain with clipping in it.
    """
    found = _OptaxState.of(opt_state)
    given = {**found.hyperparameters, **hyperparameters}
    options = _options("optax", given)
    names, nu = _flatten(found.nu)
    state = {"square_avg": nu}
    for key, option, tree in (
        ("grad_avg", "centered", found.mu),
        ("momentum_buffer", "momentum", found.trace),
    ):
        if (key in _state_in_use(options)) != (tree is not None):
            raise ValueError(
                f"optax: expected {option}={options[option]} as the state was made"
                f" with, got one with{'out' if tree is None else ''} its array"
            )
        if tree is not None:
            # Updates are added there, so its trace holds negative steps.
            sign = -1 if key == "momentum_buffer" else 1
            state[key] = [sign * _array(leaf) for leaf in _flatten(tree)[1]]
    return _state_dict("optax", options, state, found.count or 0, names)


def to_optax(state_dict: Mapping[str, Any], opt_state: Any) -> Any:
    """Returns a state of ``optax.rmsprop`` with the values of ours.

    Args:
        state_dict: of an optimizer with the rule of Optax.
        opt_state: ``optax.rmsprop(**arguments("optax", state_dict)).init(params)``. Where
            our parameters have names, they go to the leaf of that path, else in the order
            of the leaves.

    Raises:
        ValueError: for another rule, or a state that does not fit.
    """
    _groups("optax", state_dict)
    entries = _entries(state_dict)
    names = names_in(state_dict["param_groups"])
    found = _OptaxState.of(opt_state)
    paths, _ = _flatten(found.nu)
    _check_count("optax", len(paths), len(entries))
    if names is not None:
        if set(names) != set(paths):
            raise ValueError(
                f"optax: expected leaves at {sorted(names)}, got {sorted(paths)}"
            )
        entries = [entries[names.index(path)] for path in paths]
    sign = {"square_avg": 1, "grad_avg": 1, "momentum_buffer": -1}
    ours = _PEERS["optax"].state

    def replaced(field: str, tree: Any) -> Any:
        if field == "count":
            step = max((entry.get("step", 0) for entry in entries), default=0)
            return np.int32(int(step))
        key = ours[field]
        values = [
            sign[key] * _array(_value(entry, key, path))
            for entry, path in zip(entries, paths)
        ]
        return _unflatten(tree, iter(zip(paths, values)))

    return found.rebuilt(opt_state, replaced)


def from_tf1(
    checkpoint: Mapping[str, Any],
    variables: Names,
    *,
    name: str = "RMSProp",
    **hyperparameters: Any,
) -> StateDict:
    """Reads the slots of ``tf.compat.v1.train.RMSPropOptimizer``.

    Args:
        checkpoint: arrays by name, as ``tf.train.load_checkpoint`` has them: the slots of
            ``net/w`` are ``net/w/RMSProp``, ``net/w/RMSProp_1`` and so on.
        variables: the names there of our parameters, in their order or by our names.
        name: the optimizer's.
        **hyperparameters: the arguments that it was called with.

    Raises:
        TypeError: for an unknown hyperparameter.
        ValueError: if a slot is missing.
    """
    options = _options("tf1", hyperparameters)
    names, theirs = _both_names(variables)
    state: dict[str, list[Any]] = {}
    for place, key in enumerate(_tf1_slots(options)):
        if key not in _state_in_use(options):
            continue  # A buffer without momentum: the last step, which nothing reads.
        suffix = f"/{name}_{place}" if place else f"/{name}"
        state[key] = [
            _found("tf1", checkpoint, variable + suffix) for variable in theirs
        ]
    return _state_dict("tf1", options, state, 0, names)


def to_tf1(
    state_dict: Mapping[str, Any], variables: Names, *, name: str = "RMSProp"
) -> dict[str, Any]:
    """Returns the slots of ``tf.compat.v1.train.RMSPropOptimizer`` by their names there.

    Args:
        state_dict: of an optimizer with the rule of TensorFlow 1.
        variables: the names there of our parameters, in their order or by our names.
        name: the optimizer's.

    Raises:
        ValueError: for another rule, or names that do not fit.
    """
    group, *_ = _groups("tf1", state_dict)
    entries, theirs = _named_entries("tf1", state_dict, variables)
    slots = {}
    for variable, entry in zip(theirs, entries):
        for place, key in enumerate(_tf1_slots(group)):
            suffix = f"/{name}_{place}" if place else f"/{name}"
            slots[variable + suffix] = (
                _value(entry, key, variable)
                if key in _state_in_use(group)
                else np.zeros_like(_array(_value(entry, "square_avg", variable)))
            )
    return slots


def from_timm(state_dict: Mapping[str, Any]) -> StateDict:
    """Reads the ``state_dict`` of ``timm.optim.RMSpropTF``.

    What ``corrected_weight_decay`` takes for the first learning rate becomes ``initial_lr``.

    Raises:
        ValueError: if a group has ``caution``, which our rule does not, or decays by a first
            learning rate that it does not say.
    """
    found = _from_torch_like("timm", state_dict, ("caution",))
    for group, saved in zip(found["param_groups"], state_dict["param_groups"]):
        # Without decoupled_decay it has no effect there.
        if group.get("corrected_weight_decay") and group["decoupled_weight_decay"]:
            if "max_lr_snapshot" not in saved:
                raise ValueError(
                    "timm: expected max_lr_snapshot with corrected_weight_decay, got none:"
                    " add the learning rate that its optimizer was made with"
                )
            group["initial_lr"] = saved["max_lr_snapshot"]
        else:
            group["corrected_weight_decay"] = False
    return found


def to_timm(
    state_dict: Mapping[str, Any], *, array: Callable[[np.ndarray], Any] | None = None
) -> StateDict:
    """Returns a ``state_dict`` for ``timm.optim.RMSpropTF``.

    Args:
        state_dict: of an optimizer with the rule of timm.
        array: what to make of each array, as ``torch.from_numpy``; None leaves them as
            they are, right for a ``state_dict`` of :class:`rmsprop.torch.RMSprop`.

    Raises:
        ValueError: for another rule.
    """
    found = _to_torch_like("timm", state_dict, array, {})
    for group in found["param_groups"]:
        if group.get("corrected_weight_decay"):
            group["max_lr_snapshot"] = group.get("initial_lr") or group["lr"]
    return found


def from_oneflow(state_dict: Mapping[str, Any]) -> StateDict:
    """Reads the ``state_dict`` of ``oneflow.optim.RMSprop``.

    Raises:
        ValueError: if it was made with ``contiguous_params``, where state is not by
            parameter.
    """
    return _from_torch_like("oneflow", state_dict, ("contiguous_params",))


def to_oneflow(
    state_dict: Mapping[str, Any], *, array: Callable[[np.ndarray], Any] | None = None
) -> StateDict:
    """Returns a ``state_dict`` for ``oneflow.optim.RMSprop``.

    Args:
        state_dict: of an optimizer with the rule of OneFlow, so without momentum.
        array: what to make of each array, as ``oneflow.from_numpy``; None leaves them as
            they are.

    Raises:
        ValueError: for another rule.
    """
    extra = {"contiguous_params": False, "_enable_clip_grad": False}
    result = _to_torch_like("oneflow", state_dict, array, extra)
    for group in result["param_groups"]:
        group["_enable_clip_grad"] = "clip_grad_max_norm" in group
    steps = [entry.pop("step", 0) for entry in result["state"].values()]
    result["state"]["step"] = int(max(steps, default=0))  # one for all there
    return result


def from_paddle(
    state_dict: Mapping[str, Any], parameters: Names, **hyperparameters: Any
) -> StateDict:
    """Reads the ``state_dict`` of ``paddle.optimizer.RMSProp``.

    Args:
        state_dict: what it returned, or ``paddle.load`` of a ``.pdopt``.
        parameters: the names there (``p.name``) of our parameters, in their order or by
            our names.
        **hyperparameters: the arguments that it was called with.

    Raises:
        TypeError: for an unknown hyperparameter.
        ValueError: if state is missing.
    """
    options = _options("paddle", hyperparameters)
    names, theirs = _both_names(parameters)
    by_name = {}
    for key, value in state_dict.items():
        # The number at the end counts the optimizers of a process.
        match = re.fullmatch(r"(.+)_(momentum|mean_square|mean_grad)_\d+", key)
        if match:
            by_name[f"{match[1]}_{match[2]}"] = value
    state: dict[str, list[Any]] = {}
    for role, key in _PEERS["paddle"].state.items():
        if key in _state_in_use(options):
            state[key] = [_found("paddle", by_name, f"{p}_{role}") for p in theirs]
    return _state_dict("paddle", options, state, 0, names)


def to_paddle(
    state_dict: Mapping[str, Any],
    parameters: Names,
    *,
    array: Callable[[np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """Returns a ``state_dict`` for ``paddle.optimizer.RMSProp``.

    Args:
        state_dict: of an optimizer with the rule of Paddle.
        parameters: the names there (``p.name``) of our parameters, in their order or by
            our names.
        array: what to make of each array, as ``paddle.to_tensor``; None leaves them as
            they are.

    Raises:
        ValueError: for another rule, or names that do not fit.
    """
    _groups("paddle", state_dict)
    entries, theirs = _named_entries("paddle", state_dict, parameters)
    result = {}
    for name, entry in zip(theirs, entries):
        start = np.zeros_like(_array(_value(entry, "square_avg", name)))
        for role, key in _PEERS["paddle"].state.items():
            value = entry.get(key, start)
            # The number counts the optimizers of a process, of which this is the first.
            result[f"{name}_{role}_0"] = array(_array(value)) if array else value
    return result


# --- options ----------------------------------------------------------------------------


def _peer(name: str) -> _Peer:
    if name not in _PEERS:
        raise ValueError(f"name: expected one of {', '.join(_PEERS)}, got {name!r}")
    return _PEERS[name]


def _options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The whole formula, from hyperparameters under the names of a framework."""
    known = _PEERS[name].options
    options = _core.dialect(name)
    for theirs, value in given.items():
        if theirs not in known:
            raise TypeError(
                f"{name}: expected hyperparameters of {', '.join(known)}, got {theirs!r}"
            )
        ours = known[theirs]
        if ours in _FLAGS:
            options[ours] = bool(value)
            continue
        try:
            options[ours] = 0.0 if value is None else float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"{name} {theirs}: expected a number, got {type(value).__name__}: give"
                " the one that counts at the next step"
            ) from None
    return options


def _groups(name: str, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a ``state_dict``, all of which a framework can compute."""
    known = set(_peer(name).options.values())
    wanted = {**_core.dialect(name), **_OFF}
    # The torch front writes down no option of ours that is as torch's rule has it.
    start = {**_core.dialect("torch"), **_OFF}
    groups = [{**start, **group} for group in state_dict["param_groups"]]
    for index, group in enumerate(groups):
        idle = {"initial_square_avg"}  # The state is there.
        if not group.get("momentum"):
            idle |= {"lr_in_momentum", "nesterov"}
        if not group.get("weight_decay"):
            idle |= {key for key in wanted if key.endswith("_weight_decay")}
        for key, value in wanted.items():
            found = group.get(key, value)
            if key not in known and key not in idle and found != value:
                raise ValueError(
                    f"{key} of group {index}: expected {value}, as RMSprop of {name}"
                    f" computes, got {found}"
                )
    return groups


# --- state ------------------------------------------------------------------------------


def _state_dict(
    name: str,
    options: dict[str, Any],
    state: dict[str, list[Any]],
    step: int,
    names: list[str] | None = None,
) -> StateDict:
    """One group of parameters, from arrays by our key, in the order of the parameters."""
    counts = {key: len(arrays) for key, arrays in state.items()}
    count = counts["square_avg"]
    if set(counts.values()) != {count}:
        raise ValueError(f"{name}: expected as many arrays of each kind, got {counts}")
    entries = {
        index: {"step": step}
        | {key: _array(arrays[index]) for key, arrays in state.items()}
        for index in range(count)
    }
    group: dict[str, Any] = {**options, "params": list(range(count))}
    if names is not None:
        group["param_names"] = names
    return {"state": entries, "param_groups": [group]}


def _state_in_use(options: Mapping[str, Any]) -> set[str]:
    """The keys of the arrays that a step with these options reads."""
    is_used = {
        "square_avg": True,
        "grad_avg": options["centered"],
        "momentum_buffer": options["momentum"] > 0,
    }
    return {key for key, used in is_used.items() if used}


def _array(value: Any) -> np.ndarray:
    """A NumPy array of any framework's array in host memory."""
    if hasattr(value, "detach"):
        value = value.detach()
    if hasattr(value, "numpy"):
        value = value.numpy()
    return np.asarray(value)


def _entries(state_dict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The state of each parameter, in their order."""
    state = state_dict["state"]
    groups = state_dict["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    return [_wide(state.get(number, {})) for number in numbers]


def _wide(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """State as other frameworks have it: in float32 where it is stored in fewer bits."""
    names = {storage.named(getattr(value, "dtype", "")) for value in entry.values()}
    if names.isdisjoint(storage.NARROW):
        return entry
    arrays = {
        key: value if key == "step" else as_ndarray(value)
        for key, value in entry.items()
    }
    return storage.float32_entry(arrays)


def _value(entry: Mapping[str, Any], key: str, name: str) -> Any:
    if key not in entry:
        raise ValueError(f"{name}: expected {key} in the state, got {sorted(entry)}")
    return entry[key]


def _found(name: str, mapping: Mapping[str, Any], key: str) -> Any:
    if key not in mapping:
        raise ValueError(f"{name}: expected {key!r}, got {sorted(mapping)}")
    return mapping[key]


def _fitting(name: str, value: Any, like: Any) -> Any:
    """A value of the shape of another."""
    if np.shape(_array(value)) != tuple(like.shape):
        raise ValueError(
            f"{name}: expected shape {tuple(like.shape)}, got {np.shape(_array(value))}"
        )
    return value


def _check_count(name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(f"{name}: expected {wanted} parameters, got {found}")


def _both_names(names: Names) -> tuple[list[str] | None, list[str]]:
    """Our names, if there are any, and theirs."""
    if isinstance(names, str):
        raise TypeError(
            f"names: expected a sequence or a mapping of str, got {names!r}"
        )
    if isinstance(names, Mapping):
        return list(names), list(names.values())
    return None, list(names)


def _named_entries(
    name: str, state_dict: Mapping[str, Any], names: Names
) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The state of each parameter, and the framework's name for it."""
    entries = _entries(state_dict)
    ours, theirs = _both_names(names)
    _check_count(name, len(theirs), len(entries))
    if ours is not None:
        own = names_in(state_dict["param_groups"])
        if own is None or set(own) != set(ours):
            raise ValueError(f"{name}: expected names for {own}, got them for {ours}")
        entries = [entries[own.index(key)] for key in ours]
    return entries, theirs


# --- each framework ---------------------------------------------------------------------


def _keras_items(variables: Any) -> list[tuple[str, Any]]:
    """Variables and their paths."""
    if isinstance(variables, Mapping):
        return list(variables.items())
    return [(variable.path, variable) for variable in variables]


def _keras_role(path: str) -> str:
    """What a variable is, from the end of its path."""
    name = path.rsplit("/", 1)[-1]
    if name in ("iteration", "learning_rate"):
        return name
    match = re.search(r"_(velocity|momentum|average_gradient)(?:_\d+)?$", name)
    return match[1] if match else name


def _tf1_slots(options: Mapping[str, Any]) -> list[str]:
    """The slots in the order in which they are made."""
    return [
        "square_avg",
        *(["grad_avg"] if options["centered"] else []),
        "momentum_buffer",
    ]


def _from_torch_like(
    name: str, state_dict: Mapping[str, Any], refused: tuple[str, ...]
) -> StateDict:
    """Groups and state by parameter under torch's names."""
    known = _PEERS[name].options
    dropped = {*refused, "foreach", "max_lr_snapshot", "_enable_clip_grad"}
    groups = []
    for index, group in enumerate(state_dict["param_groups"]):
        for key in refused:
            if group.get(key):
                raise ValueError(
                    f"{name} group {index}: expected no {key}, which is no part of our"
                    f" rule, got {group[key]}"
                )
        others = {k: v for k, v in group.items() if k not in dropped and k not in known}
        given = {k: v for k, v in group.items() if k in known}
        groups.append({**others, **_options(name, given)})
    state = state_dict["state"]
    shared = state.get("step")
    entries = {
        number: ({"step": shared} if shared is not None else {}) | dict(entry)
        for number, entry in state.items()
        if number != "step"
    }
    return {"state": entries, "param_groups": groups}


def _to_torch_like(
    name: str,
    state_dict: Mapping[str, Any],
    array: Callable[[np.ndarray], Any] | None,
    extra: dict[str, Any],
) -> StateDict:
    names = {ours: theirs for theirs, ours in _PEERS[name].options.items()}
    formula = {*_core.dialect(name), *_OFF} - set(names)
    ours_alone = {"contiguous_params", "capturable", "differentiable", "foreach"}
    groups = [
        {
            names.get(key, key): value
            for key, value in group.items()
            if key not in formula and key not in ours_alone
        }
        | extra
        for group in _groups(name, state_dict)
    ]
    state = {}
    for number, stored in state_dict["state"].items():
        entry = _wide(stored)
        kept = {key: entry[key] for key in entry if key in (*_TORCH_STATE, "step")}
        if array is not None:
            kept = {
                key: array(np.asarray(value, np.float32) if key == "step" else value)
                for key, value in kept.items()
            }
        state[number] = kept
    return {"state": state, "param_groups": groups}


#: What `optax.rmsprop` is a chain of, and parts of others that have no arrays.
_OPTAX_STATES = re.compile(
    r"ScaleBy(Rms|RStdDev)(WithCount)?State|(Trace|ScaleBySchedule|Empty)State"
)


class _OptaxState:
    """The parts of a state of ``optax.rmsprop``, found by the names of their fields."""

    def __init__(self) -> None:
        self.nu: Any = None
        self.mu: Any = None
        self.trace: Any = None
        self.count: int | None = None
        self.hyperparameters: dict[str, Any] = {}

    @staticmethod
    def of(opt_state: Any) -> _OptaxState:
        found = _OptaxState()
        found.walk(opt_state)
        if found.nu is None:
            raise ValueError(
                "optax: expected the state of optax.rmsprop, got none with the field nu"
            )
        return found

    def walk(self, state: Any) -> None:
        fields = getattr(state, "_fields", None)
        if fields is None:
            if not isinstance(state, (tuple, list)):
                raise self._unknown(state)
            for part in state:
                self.walk(part)
        elif "inner_state" in fields and "hyperparams" in fields:
            self.hyperparameters |= state.hyperparams
            self.count = int(state.count)
            self.walk(state.inner_state)
        elif _OPTAX_STATES.fullmatch(type(state).__name__):
            for field in fields:
                # A schedule counts too.
                if getattr(self, field) is not None and field != "count":
                    raise ValueError(f"optax: expected one {field}, got two")
                value = getattr(state, field)
                setattr(self, field, int(value) if field == "count" else value)
        else:
            raise self._unknown(state)

    def rebuilt(self, state: Any, replaced: Callable[[str, Any], Any]) -> Any:
        """The state with other values in these fields."""
        fields = getattr(state, "_fields", None)
        if fields is None:
            return type(state)(self.rebuilt(part, replaced) for part in state)
        if "inner_state" in fields:
            return state._replace(
                count=replaced("count", None),
                inner_state=self.rebuilt(state.inner_state, replaced),
            )
        new = {field: replaced(field, getattr(state, field)) for field in fields}
        return state._replace(**new)

    @staticmethod
    def _unknown(state: Any) -> ValueError:
        return ValueError(
            "optax: expected the state of optax.rmsprop, got one with"
            f" {type(state).__name__}: take out the part that is rmsprop's"
        )


def _flatten(tree: Any) -> tuple[list[str], list[Any]]:
    """The paths and leaves of a pytree, in the order of JAX."""
    pairs = list(_leaves(tree, ()))
    return ["/".join(path) for path, _ in pairs], [leaf for _, leaf in pairs]


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if tree is None:
        return
    for key, child in _children(tree) or ():
        yield from _leaves(child, (*path, str(key)))
    if _children(tree) is None:
        yield path, tree


def _children(tree: Any) -> list[tuple[Any, Any]] | None:
    """Keys and subtrees; None for a leaf."""
    if isinstance(tree, Mapping):
        keys = list(tree) if isinstance(tree, OrderedDict) else sorted(tree)
        return [(key, tree[key]) for key in keys]
    if isinstance(tree, (list, tuple)):
        names = getattr(tree, "_fields", range(len(tree)))
        return list(zip(names, tree))
    return None


def _unflatten(tree: Any, values: Iterator[tuple[str, Any]]) -> Any:
    """The tree with other leaves."""
    if tree is None:
        return None
    children = _children(tree)
    if children is None:
        path, value = next(values)
        value = _fitting(path, value, tree)
        # JAX's own arrays make one of theirs; some of Optax takes nothing else.
        return tree.at[...].set(value) if hasattr(tree, "at") else value
    new = {key: _unflatten(child, values) for key, child in children}
    kind: Any = type(tree)
    if isinstance(tree, Mapping):
        return kind((key, new[key]) for key in tree)
    return tree._replace(**new) if hasattr(tree, "_fields") else kind(new.values())
