"""One file with parameters, state and groups, so that training can stop and go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from rmsprop._core import __version__
from rmsprop.optimizer import RMSprop, numbered
from rmsprop.state import as_ndarray

# Entries of a file's metadata that are not the user's.
_VERSION = "rmsprop"
_GROUPS = "param_groups"


def save(
    path: str | os.PathLike[str],
    opt: RMSprop,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Saves parameters, state and groups of an optimizer in one safetensors file.

    The file holds the tensors ``param/<name>``, ``step/<name>``, ``square_avg/<name>`` and
    so on; without names, the index of a parameter stands for its name. The groups are in
    its metadata, as JSON. Any program that reads safetensors can read it. It needs the
    package ``safetensors``.

    It is written beside ``path``, flushed to the disk, and then takes its place: whenever
    the process is killed, ``path`` is the old file or the new one, whole.

    Args:
        path: where to; a file that is there is replaced.
        opt: the optimizer; nothing in it changes.
        metadata: what else training needs in order to go on, as strings by name.

    Raises:
        TypeError: for another optimizer (torch's go with ``torch.save``), or what is not
            a string in ``metadata``.
        ValueError: if a group holds what JSON has no form for.
        OSError: if it cannot be written; the old file is as it was then.

    Example:
        >>> w = np.ones(3, np.float32)
        >>> opt = RMSprop({"w": w}, lr=0.1)
        >>> save(path, opt, metadata={"epoch": "7"})
        >>> w[...] = 0
        >>> load(path, opt), w
        ({'epoch': '7'}, array([1., 1., 1.], dtype=float32))
    """
    safetensors = _safetensors("save")
    _check_optimizer("save", opt)
    groups = numbered(opt.param_groups)
    notes = dict(metadata or {})
    for key, value in notes.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(
                f"metadata: expected strings by name, got {value!r} for {key!r}"
            )
        if key in (_VERSION, _GROUPS):
            raise ValueError(f"metadata: expected another name than {key!r}")
    tensors: dict[str, Any] = {}
    for index, (label, param) in enumerate(zip(_labels(groups), _parameters(opt))):
        tensors[f"param/{label}"] = as_ndarray(param)
        for key, value in opt.state[index].items():
            number = key == "step"
            tensors[f"{key}/{label}"] = np.uint64(value) if number else value
    # Bytes are taken in the order of memory.
    dense = {key: np.asarray(value, order="C") for key, value in tensors.items()}
    notes |= {_VERSION: __version__, _GROUPS: _as_json(groups)}
    # (Its own save_file leaves files that nobody else can read, mode 0600.)
    _replace(path, safetensors.numpy.save(dense, metadata=notes))


def load(path: str | os.PathLike[str], opt: RMSprop) -> dict[str, str]:
    """Loads what :func:`save` saved into the parameters of an optimizer and into itself.

    The parameters are written in place. Where both sides have names for all of them they
    go by name, else by position, like their state; the options of the groups come from the
    file. All is checked before anything is written.

    Args:
        path: a file of :func:`save`.
        opt: an optimizer of parameters of the same shapes and dtypes.

    Returns:
        The ``metadata`` that it was saved with.

    Raises:
        TypeError: for another optimizer.
        ValueError: for a file of something else, or one that does not fit; parameters and
            optimizer are unchanged then.
        OSError: if it cannot be read.
    """
    safetensors = _safetensors("load")
    _check_optimizer("load", opt)
    os.stat(path)  # so that what is missing is an OSError
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            notes = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{os.fspath(path)}: expected safetensors, got {error}"
        ) from None
    if _GROUPS not in notes or _VERSION not in notes:
        raise ValueError(
            f"{os.fspath(path)}: expected a file of rmsprop.save, got one with the"
            f" metadata {sorted(notes)}"
        )
    del notes[_VERSION]
    try:
        groups = json.loads(notes.pop(_GROUPS))
        labels = {label: index for index, label in enumerate(_labels(groups))}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{os.fspath(path)}: expected groups as rmsprop.save writes them ({error})"
        ) from None
    params: dict[int, np.ndarray] = {}
    state: dict[int, dict[str, Any]] = {index: {} for index in labels.values()}
    for key, value in tensors.items():
        role, _, label = key.partition("/")
        if label not in labels:
            raise ValueError(f"{os.fspath(path)}: expected no tensor {key!r}")
        if role == "param":
            params[labels[label]] = value
        else:
            state[labels[label]][role] = int(value) if role == "step" else value
    loaded = opt._checked_state_dict({"state": state, "param_groups": groups})
    destinations = _parameters(opt)
    written = []
    for label, index in labels.items():
        place = loaded.places[index]
        array = as_ndarray(destinations[place])
        found = params.get(index)
        if not array.flags.writeable:
            raise ValueError(f"parameter {place}: expected a writable array")
        if found is None or (found.shape, found.dtype) != (array.shape, array.dtype):
            got = "none" if found is None else f"{found.dtype} of shape {found.shape}"
            raise ValueError(
                f"parameter {place} ({label!r} in {os.fspath(path)}): expected"
                f" {array.dtype} of shape {array.shape}, got {got}"
            )
        written.append((array, found))
    opt._take(loaded, written)
    return notes


def _safetensors(name: str) -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            f"rmsprop.{name} needs the package safetensors: pip install safetensors"
        ) from None
    return safetensors


def _check_optimizer(name: str, opt: object) -> None:
    if not isinstance(opt, RMSprop):
        raise TypeError(
            f"{name}: expected an rmsprop.RMSprop, got {type(opt).__module__}."
            f"{type(opt).__qualname__} (optimizers of torch go with torch.save)"
        )


def _parameters(opt: RMSprop) -> list[Any]:
    return [param for group in opt.param_groups for param in group["params"]]


def _labels(groups: list[dict[str, Any]]) -> Iterator[str]:
    """What stands for each parameter in the names of tensors."""
    for group in groups:
        yield from group.get("param_names", map(str, group["params"]))


def _as_json(groups: list[dict[str, Any]]) -> str:
    """Also numbers of NumPy and torch, as Python's."""
    for index, group in enumerate(groups):
        for key, value in group.items():
            try:
                json.dumps(value, default=lambda number: number.item())
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{key} of group {index}: expected what JSON has a form for, got"
                    f" {type(value).__name__} ({error})"
                ) from None
    return json.dumps(groups, default=lambda number: number.item())


def _replace(path: str | os.PathLike[str], data: bytes) -> None:
    """Makes that the content of a file, at once."""
    folder, name = os.path.split(os.path.realpath(path))
    new = os.path.join(folder, f".{name}.{os.urandom(4).hex()}")
    try:
        with open(new, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, os.path.join(folder, name))
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be flushed
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
