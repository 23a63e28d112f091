"""The front for arrays and its rivals: NumPy by hand, numba."""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import rmsprop

from harness import is_installed
from harness.timing import ALPHA, EPS, LR, Arrays, Factory, LeftOut, Run, fastest

# Elements. With --cases 10m the best of 4 Ki to 128 Ki (Zen 5, NumPy 2.4.6, 2026-11).
BLOCK = 64 * 1024
LIMIT_FROM = 200_000  # elements: below, calls cost more than memory
# With momentum, for the loops that have it.
MOMENTUM = 0.9


def ours(params: Arrays, grads: Arrays, threads: int, **options: Any) -> Run:
    return _with_grads(
        rmsprop.RMSprop(params, lr=LR, threads=threads, **options), grads
    )


def a_group_each(params: Arrays, grads: Arrays, threads: int) -> Run:
    groups = [{"params": [p]} for p in params]
    return _with_grads(rmsprop.RMSprop(groups, lr=LR, threads=threads), grads)


def by_parameters(contiguous: bool, params: Arrays, grads: Arrays, threads: int) -> Run:
    """Ours, with each gradient in the `.grad` of its parameter."""
    wrapped = [rmsprop.Parameter(p) for p in params]
    for parameter, grad in zip(wrapped, grads):
        parameter.grad = grad
    step = rmsprop.RMSprop(
        wrapped, lr=LR, contiguous_params=contiguous, threads=threads
    ).step

    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return run


def with_float64(params: Arrays, grads: Arrays, threads: int) -> Run:
    """Ours, with gradients that NumPy made in its usual type."""
    run = ours(params, [g.astype(np.float64) for g in grads], threads)
    try:
        run(1)
    except TypeError as error:
        raise LeftOut(str(error)) from error
    return run


def with_float64_cast(params: Arrays, grads: Arrays, threads: int) -> Run:
    """The same where they are cast before each step."""
    given = [g.astype(np.float64) for g in grads]
    step = rmsprop.RMSprop(params, lr=LR, threads=threads).step

    def run(steps: int) -> None:
        for _ in range(steps):
            step(grads=[g.astype(np.float32) for g in given])

    return run


def _with_grads(optimizer: rmsprop.RMSprop, grads: Arrays) -> Run:
    step = optimizer.step

    def run(steps: int) -> None:
        for _ in range(steps):
            step(grads=grads)

    return run


Rows = list[tuple[np.ndarray, ...]]  # p, g, v; for NumPy two more, to work in


def plain_update(rows: Rows) -> Run:
    """As one writes it: every result into an array that is there already."""

    def run(steps: int) -> None:
        for _ in range(steps):
            for p, g, v, a, b in rows:
                np.multiply(g, 1 - ALPHA, out=a)
                np.multiply(a, g, out=a)
                np.multiply(v, ALPHA, out=v)
                np.add(v, a, out=v)
                np.add(v, EPS, out=a)
                np.sqrt(a, out=a)
                np.multiply(g, LR, out=b)
                np.divide(b, a, out=b)
                np.subtract(p, b, out=p)

    return run


def tuned_update(rows: Rows) -> Run:
    """The same with all that is known to make NumPy's calls cheaper.

    Hyperparameters are 0-d arrays and the output is the last argument, not `out=`: that
    made mlp64 15 us instead of 24 (Zen 5, NumPy 2.4.6, 2026-11).
    """
    hyper = (np.array(h, np.float32) for h in (LR, ALPHA, 1 - ALPHA, EPS))
    lr, alpha, one_minus_alpha, eps = hyper
    add, multiply = np.add, np.multiply
    subtract, divide, sqrt = np.subtract, np.divide, np.sqrt

    def run(steps: int) -> None:
        for _ in range(steps):
            for p, g, v, a, b in rows:
                multiply(g, one_minus_alpha, a)
                multiply(a, g, a)
                multiply(v, alpha, v)
                add(v, a, v)
                add(v, eps, a)
                sqrt(a, a)
                multiply(g, lr, b)
                divide(b, a, b)
                subtract(p, b, p)

    return run


def by_numpy(
    update: Callable[[Rows], Run], params: Arrays, grads: Arrays, threads: int
) -> Run | None:
    """Written by hand: whole arrays, no allocation in a step."""
    if threads > 1:
        return None
    rows: Rows = [
        (p, g, np.zeros_like(p), np.empty_like(p), np.empty_like(p))
        for p, g in zip(params, grads)
    ]
    return update(rows)


def by_numpy_blocks(params: Arrays, grads: Arrays, threads: int) -> Run | None:
    """The same, a cache-sized block at a time: the best that NumPy alone can do."""
    if threads > 1 or max(p.size for p in params) <= BLOCK:
        return None
    a, b = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    rows: Rows = []
    for p, g in zip(params, grads):
        p, g, v = p.reshape(-1), g.reshape(-1), np.zeros(p.size, np.float32)
        for start in range(0, p.size, BLOCK):
            views = [x[start : start + BLOCK] for x in (p, g, v)]
            rows.append((*views, a[: views[0].size], b[: views[0].size]))
    return tuned_update(rows)


Kernel = Callable[..., Any]


@functools.cache
def numba_loop(threads: int, centered: bool = False, momentum: bool = False) -> Kernel:
    """The rule as one loop over the arrays of a tensor, each form compiled by itself."""
    numba = import_module("numba")
    loop = numba.prange if threads > 1 else range

    # With Python's division, which raises on zero, LLVM could not vectorize the loop.
    @numba.njit(error_model="numpy", cache=True, parallel=threads > 1)
    def update(
        p: Any, g: Any, v: Any, m: Any, b: Any, lr: Any, alpha: Any, rest: Any, eps: Any
    ) -> None:
        for i in loop(p.size):
            x = g[i]
            s = alpha * v[i] + (rest * x) * x
            v[i] = s
            if centered:
                mean = alpha * m[i] + rest * x
                m[i] = mean
                s = max(s - mean * mean, np.float32(0))
            x = (lr * x) / np.sqrt(s + eps)
            if momentum:
                x = np.float32(MOMENTUM) * b[i] + x
                b[i] = x
            p[i] -= x

    return update


@functools.cache
def _numba_over_all() -> Kernel:
    """The plain rule over lists of arrays."""
    numba = import_module("numba")

    @numba.njit(error_model="numpy", cache=True)
    def update(
        params: Any,
        grads: Any,
        square_avg: Any,
        lr: Any,
        alpha: Any,
        rest: Any,
        eps: Any,
    ) -> None:
        for k in range(len(params)):
            p, g, v = params[k], grads[k], square_avg[k]
            for i in range(p.size):
                x = g[i]
                s = alpha * v[i] + (rest * x) * x
                v[i] = s
                p[i] -= (lr * x) / np.sqrt(s + eps)

    return update


@functools.cache
def _numba_streams(threads: int) -> tuple[Kernel, Kernel]:
    """The five streams with a multiply-add, and the squares of the gradients."""
    numba = import_module("numba")
    loop = numba.prange if threads > 1 else range

    @numba.njit(error_model="numpy", cache=True, parallel=threads > 1)
    def streams(p: Any, g: Any, v: Any, c: Any) -> None:
        for i in loop(p.size):
            x = g[i]
            p[i] = p[i] * c + x
            v[i] = v[i] * c + x

    @numba.njit(cache=True, fastmath=True, parallel=threads > 1)
    def squares(g: Any) -> Any:
        total = np.float32(0)
        for i in loop(g.size):
            total += g[i] * g[i]
        return total

    return streams, squares


def _hyperparameters() -> tuple[np.float32, ...]:
    return tuple(np.float32(h) for h in (LR, ALPHA, 1 - ALPHA, EPS))


def _limit_numba(threads: int) -> None:
    numba = import_module("numba")
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))


def by_numba_threads(
    params: Arrays,
    grads: Arrays,
    threads: int,
    *,
    centered: bool = False,
    momentum: bool = False,
) -> Run | None:
    """A fused loop under `njit`, called for each tensor with the gradient it has now.

    On that many threads, whether that is faster or not.
    """
    if not is_installed("numba"):
        return None
    update, hyper = numba_loop(threads, centered, momentum), _hyperparameters()
    rows = []
    for p, g in zip(params, grads):
        v = np.zeros(p.size, np.float32)
        m = np.zeros(p.size, np.float32) if centered else v
        b = np.zeros(p.size, np.float32) if momentum else v
        rows.append((p.reshape(-1), g.reshape(-1), v, m, b))

    def run(steps: int) -> None:
        if threads > 1:
            _limit_numba(threads)
        for _ in range(steps):
            for row in rows:
                update(*row, *hyper)

    return run


def by_numba(params: Arrays, grads: Arrays, threads: int) -> Run | None:
    """The same on so many threads or on one, whichever is faster."""
    counts = {1, threads}
    runs = [by_numba_threads(params, grads, count) for count in counts]
    found = [run for run in runs if run]
    return fastest(found) if len(found) > 1 else next(iter(found), None)


def by_numba_at_once(params: Arrays, grads: Arrays, threads: int) -> Run | None:
    """One call for all tensors, over tuples or typed lists of them.

    These have it easier than in a training loop: they are filled once, not with the
    gradients of each step.
    """
    if not is_installed("numba") or threads > 1 or len(params) == 1:
        return None
    update, hyper = _numba_over_all(), _hyperparameters()
    flat = [[x.reshape(-1) for x in arrays] for arrays in (params, grads)]
    flat.append([np.zeros_like(p) for p in flat[0]])

    def at_once(make: Callable[[Arrays], object]) -> Run:
        arrays = tuple(map(make, flat))

        def run(steps: int) -> None:
            for _ in range(steps):
                update(*arrays, *hyper)

        return run

    kinds: list[Callable[[Arrays], object]] = [import_module("numba.typed").List]
    if len(params) <= 10:  # each length of a tuple is compiled anew
        kinds.append(tuple)
    return fastest([at_once(kind) for kind in kinds])


def limit(
    params: Arrays, grads: Arrays, threads: int, *, clip: bool = False
) -> Run | None:
    """The five streams with a multiply-add, over one array of as many elements.

    With `clip` six: g is read once more, and its squares added up, before.
    """
    numel, c = sum(p.size for p in params), np.float32(0.5)
    if numel < LIMIT_FROM or not is_installed("numba"):
        return None
    # From the beginning of a cache line, which makes it a tenth faster.
    p, g, v = (placed(numel, 0, 64) for _ in "pgv")
    np.concatenate([g.ravel() for g in grads], out=g)
    streams, squares = _numba_streams(threads)

    def run(steps: int) -> None:
        if threads > 1:
            _limit_numba(threads)
        for _ in range(steps):
            if clip:
                squares(g)
            streams(p, g, v, c)

    return run


def placed(numel: int, offset: int, modulus: int) -> np.ndarray:
    """Zeros that begin so many bytes behind a multiple of the modulus."""
    array = np.zeros(numel * 4 + modulus, np.uint8)
    start = (offset - array.ctypes.data) % modulus
    return array[start : start + numel * 4].view(np.float32)


# A rival is one function more: add it here. It may return None where it does not apply.
RIVALS: dict[str, Factory] = {
    "rmsprop": ours,
    "numpy": functools.partial(by_numpy, plain_update),
    "numpy, tuned": functools.partial(by_numpy, tuned_update),
    "numpy, blocks": by_numpy_blocks,
    "numba": by_numba,
    "numba, at once": by_numba_at_once,
}


def rivals(kind: str) -> dict[str, Factory]:
    """Those of cases of that kind, ours first; none if arrays have no such cases."""
    if kind == "plain":
        return {**RIVALS, "limit": limit}
    if kind == "cold":
        return RIVALS
    if kind == "groups":
        each = {"rmsprop, a group each": a_group_each}
        return {"rmsprop": ours, **each, "numba": by_numba}
    if kind == "float64":
        return {
            "rmsprop": ours,
            "rmsprop, float64 gradients": with_float64,
            "rmsprop, cast before": with_float64_cast,
        }
    return {}
