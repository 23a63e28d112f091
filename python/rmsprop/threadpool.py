"""rmsprop's threads for threadpoolctl, which limits the threads of many libraries at once."""

from __future__ import annotations

import os
from abc import ABCMeta

import threadpoolctl  # type: ignore[import-untyped]

from rmsprop import _core

_LIBRARY = os.path.realpath(_core.__file__)


class _Unlimited(int):
    """What is used while there is no limit; given back, it takes the limit away."""

    __slots__ = ()


class Controller(threadpoolctl.LibController, metaclass=ABCMeta):  # type: ignore[misc]
    """Lists rmsprop in ``threadpool_info`` and obeys ``threadpool_limits``.

    The limit holds for every step of the process from its next step on, whatever
    ``threads`` says.
    """

    user_api = internal_api = "rmsprop"
    filename_prefixes = (os.path.basename(_LIBRARY).lower(),)
    check_symbols = ("PyInit__core",)

    def set_additional_attributes(self) -> None:
        # Another package's library of the same name is none of ours.
        if self.filepath != _LIBRARY:
            self.dynlib = None

    # (Its stubs say that both return None.)
    def get_num_threads(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _core._thread_limit() or _Unlimited(_core.info()["threads"])

    def set_num_threads(self, num_threads: int) -> None:
        is_unlimited = isinstance(num_threads, _Unlimited)
        _core._set_thread_limit(None if is_unlimited else num_threads)

    def get_version(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _core.__version__


threadpoolctl.register(Controller)
