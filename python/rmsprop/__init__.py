"""RMSprop for CPU training as one fused pass.

For each element of a parameter p with gradient grad, where v is the state
``square_avg``, m ``grad_avg``, b ``momentum_buffer`` and e ``ema``, in this order, each
operation rounded once in the type of the parameter::

    g = grad_scale * grad                -1 to maximize, times the clipping factor
    g = g + weight_decay * p             L2; decoupled: p = p - (lr*weight_decay) * p
    v = alpha * v + ((1 - alpha) * g) * g
    m = alpha * m + (1 - alpha) * g      centered
    d = c * v - (c * m)^2, at least 0    centered; else d = c * v
    s = sqrt(d + eps_in) + eps_out       one of the two is eps, the other 0
    p = p - (lr * g) / s                 without momentum; with it:
    b = momentum * b + (lr_in * g) / s   one of lr_in and lr_out is lr, the other 1
    p = p - lr_out * b                   nesterov: lr_out*((lr_in*g)/s + momentum*b)
    p = min(max(p, -limit), limit)       with clip_weights
    e = ema_decay * e + (1 - ema_decay) * p   with ema_decay

Decoupled decay is left out, with ``cautious_weight_decay``, where what is subtracted of p
at the end has not its sign; with ``corrected_weight_decay`` its factor is
``lr * lr / initial_lr * weight_decay``. c is 1 / (1 - alpha^t) with
``bias_correction``, else 1. Which framework's RMSprop that is depends on the options
alone: :func:`dialect`.
"""

import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

try:
    from rmsprop._core import __version__, info
except ImportError as _error:
    if sys.argv[:1] == ["-m"] and "rmsprop" in sys.orig_argv:  # a command, no program
        sys.exit(f"python -m rmsprop: {_error}")
    raise
from rmsprop.optimizer import RMSprop, dialect
from rmsprop.parameter import Parameter

if TYPE_CHECKING:
    from rmsprop.checkpoint import load, save

with suppress(ImportError):  # where threadpoolctl is installed, it knows of our threads
    import_module("rmsprop.threadpool")


def __getattr__(name: str) -> object:
    # Importing torch takes seconds, so it waits until it is asked for.
    if name in ("convert", "torch"):
        return import_module(f"rmsprop.{name}")
    if name in ("load", "save"):  # json takes as long to import as all the rest of ours
        return getattr(import_module("rmsprop.checkpoint"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Parameter", "RMSprop", "__version__", "dialect", "info", "load", "save"]
