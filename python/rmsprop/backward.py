"""Steps of :mod:`rmsprop.torch` inside the backward: each parameter once its gradient is there."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rmsprop.fallback import Group, Place, Steps

if TYPE_CHECKING:
    from typing_extensions import Self

#: The options that need all gradients at once, and their values that do not.
OFF = {"max_grad_norm": None, "nonfinite": "propagate"}


def check(option: str, value: Any) -> None:
    """Raises ValueError for a value of an option that needs all gradients at once."""
    if value != OFF[option]:
        raise ValueError(
            f"{option}: expected {OFF[option]!r} for steps in backward, where the gradients"
            f" are never there all at once, got {value!r}"
        )


class Handle:
    """Ends steps in backward: by ``remove()``, or at the end of a ``with`` block."""

    def __init__(self, opt: Steps) -> None:
        self._opt = weakref.ref(opt)
        self._updates = 0
        self._has_warned = False
        self._hooks: list[RemovableHandle] = []
        self.add(opt.param_groups, range(len(opt.param_groups)))

    def add(self, groups: list[Group], places: Iterable[int]) -> None:
        """Adds the hooks of the groups at these places; none if it raises."""
        hooks: list[RemovableHandle] = []
        try:
            for place in places:
                for index, p in enumerate(groups[place]["params"]):
                    hooks.append(_register(p, _Hook(self._opt, (place, index))))
        except BaseException:
            _remove(hooks)
            raise
        self._hooks += hooks

    def begin_update(self) -> None:
        """Takes note of a `step` or `zero_grad`: the next backward is another update."""
        self._updates += 1

    def check_update(self, last: int) -> int:
        """Warns, once, where a parameter was stepped in this update already; gives its number."""
        if last == self._updates and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "step_in_backward: expected step() or zero_grad() between two backwards, got"
                " none: each backward is an update, so gradients do not add up, and"
                " clip_grad_norm_ finds none to clip",
                UserWarning,
                stacklevel=2,
            )
        return self._updates

    def remove(self) -> None:
        """Leaves all parameters to ``step`` again; a second time does nothing."""
        opt = self._opt()
        if opt is not None and opt._in_backward is self:
            opt._in_backward = None
        _remove(self._hooks)
        self._hooks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Hook:
    """Steps one parameter; autograd calls it when its gradient is complete.

    It must not keep the optimizer alive: autograd keeps the hook, and the garbage collector
    does not look there, so nothing would free an optimizer that was forgotten.
    """

    __slots__ = ("opt", "place", "update")

    def __init__(self, opt: weakref.ref[Steps], place: Place) -> None:
        self.opt = opt
        self.place = place
        self.update = -1  # the last one in which it stepped

    def __call__(self, p: Tensor) -> None:
        if (opt := self.opt()) is None:
            return
        place, index = self.place
        try:
            is_there = opt.param_groups[place]["params"][index] is p
        except LookupError:
            is_there = False
        if is_there or self._finds(p, opt.param_groups):
            # None if another hook has ended it meanwhile; this one is still called.
            if opt._in_backward is not None:
                self.update = opt._in_backward.check_update(self.update)
            opt._step(self.place)
            p.grad = None

    def _finds(self, p: Tensor, groups: list[Group]) -> bool:
        """Looks where a parameter is by now, for groups may have been edited."""
        for place, group in enumerate(groups):
            for index, other in enumerate(group["params"]):
                if other is p:
                    self.place = place, index
                    return True
        return False


def _register(p: Tensor, hook: _Hook) -> RemovableHandle:
    """Also for a frozen parameter, which may be trained later; torch refuses those."""
    is_frozen = not p.requires_grad
    if is_frozen:
        p.requires_grad_(True)
    try:
        register: Any = p.register_post_accumulate_grad_hook
        handle: RemovableHandle = register(hook)
        return handle
    finally:
        if is_frozen:
            p.requires_grad_(False)


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
