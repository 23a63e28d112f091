"""The front for arrays and its rivals: NumPy by hand, numba."""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

import rmsprop
from rmsprop.bench.timing import (
    ALPHA,
    EPS,
    LIMIT_FROM,
    LR,
    Arrays,
    Contender,
    Factory,
    Run,
    fastest,
)
from rmsprop.machine import is_installed

# Elements. With --cases 10m the best of 4 Ki to 128 Ki (Zen 5, NumPy 2.4.6, 2026-11).
BLOCK = 64 * 1024


def ours(params: Arrays, grads: Arrays, threads: int) -> Contender:
    step = rmsprop.RMSprop(params, lr=LR, threads=threads).step

    def run(steps: int) -> None:
        for _ in range(steps):
            step(grads=grads)

    return "", run


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
) -> Contender | None:
    """Written by hand: whole arrays, no allocation in a step."""
    if threads > 1:
        return None
    rows: Rows = [
        (p, g, np.zeros_like(p), np.empty_like(p), np.empty_like(p))
        for p, g in zip(params, grads)
    ]
    return "", update(rows)


def by_numpy_blocks(params: Arrays, grads: Arrays, threads: int) -> Contender | None:
    """The same, a cache-sized block at a time: the best that NumPy alone can do."""
    if threads > 1 or max(p.size for p in params) <= BLOCK:
        return None
    a, b = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    rows = []
    for p, g in zip(params, grads):
        p, g, v = p.reshape(-1), g.reshape(-1), np.zeros(p.size, np.float32)
        for start in range(0, p.size, BLOCK):
            views = [x[start : start + BLOCK] for x in (p, g, v)]
            rows.append((*views, a[: views[0].size], b[: views[0].size]))
    return "", tuned_update(rows)


Kernel = Callable[..., None]


def _define_kernels() -> tuple[Kernel, ...]:
    numba = import_module("numba")

    # With Python's division, which raises on zero, LLVM could not vectorize the loop.
    jit: Callable[[Kernel], Kernel] = numba.njit(error_model="numpy", cache=True)
    jit_parallel: Callable[[Kernel], Kernel] = numba.njit(
        error_model="numpy", cache=True, parallel=True
    )

    @jit
    def one(
        p: Any, g: Any, v: Any, lr: Any, alpha: Any, one_minus_alpha: Any, eps: Any
    ) -> None:
        for i in range(p.size):
            x = g[i]
            s = alpha * v[i] + (one_minus_alpha * x) * x
            v[i] = s
            p[i] -= (lr * x) / np.sqrt(s + eps)

    @jit
    def several(
        params: Any,
        grads: Any,
        square_avg: Any,
        lr: Any,
        alpha: Any,
        one_minus_alpha: Any,
        eps: Any,
    ) -> None:
        for k in range(len(params)):
            p, g, v = params[k], grads[k], square_avg[k]
            for i in range(p.size):
                x = g[i]
                s = alpha * v[i] + (one_minus_alpha * x) * x
                v[i] = s
                p[i] -= (lr * x) / np.sqrt(s + eps)

    @jit_parallel
    def parallel(
        p: Any, g: Any, v: Any, lr: Any, alpha: Any, one_minus_alpha: Any, eps: Any
    ) -> None:
        for i in numba.prange(p.size):
            x = g[i]
            s = alpha * v[i] + (one_minus_alpha * x) * x
            v[i] = s
            p[i] -= (lr * x) / np.sqrt(s + eps)

    @jit
    def limit(p: Any, g: Any, v: Any, c: Any) -> None:
        for i in range(p.size):
            x = g[i]
            p[i] = p[i] * c + x
            v[i] = v[i] * c + x

    @jit_parallel
    def limit_parallel(p: Any, g: Any, v: Any, c: Any) -> None:
        for i in numba.prange(p.size):
            x = g[i]
            p[i] = p[i] * c + x
            v[i] = v[i] * c + x

    jit_reduction: Callable[[Kernel], Kernel] = numba.njit(
        error_model="numpy", cache=True, fastmath=True
    )
    jit_reduction_parallel: Callable[[Kernel], Kernel] = numba.njit(
        error_model="numpy", cache=True, fastmath=True, parallel=True
    )

    @jit_reduction
    def squares(g: Any) -> Any:
        total = np.float32(0)
        for i in range(g.size):
            total += g[i] * g[i]
        return total

    @jit_reduction_parallel
    def squares_parallel(g: Any) -> Any:
        total = np.float32(0)
        for i in numba.prange(g.size):
            total += g[i] * g[i]
        return total

    return (
        *(one, several, parallel, limit, limit_parallel),
        *(squares, squares_parallel),
    )


_numba_kernels = functools.cache(_define_kernels)


def by_numba(params: Arrays, grads: Arrays, threads: int) -> Contender | None:
    """A fused loop under `njit`, called for each tensor with the gradient it has now."""
    if not is_installed("numba"):
        return None
    rows = _numba_rows(params, grads)
    calls = _numba_calls(rows, 1)
    if threads == 1:
        return "", calls
    return fastest({"serial": calls, "parallel": _numba_calls(rows, threads)})


def by_numba_threads(params: Arrays, grads: Arrays, threads: int) -> Contender | None:
    """The same on that many threads, whether that is faster or not."""
    if not is_installed("numba"):
        return None
    return "", _numba_calls(_numba_rows(params, grads), threads)


def _numba_rows(params: Arrays, grads: Arrays) -> Rows:
    return [
        (p.reshape(-1), g.reshape(-1), np.zeros(p.size, np.float32))
        for p, g in zip(params, grads)
    ]


def _numba_calls(rows: Rows, threads: int) -> Run:
    numba = import_module("numba")
    one, _, parallel, *_ = _numba_kernels()
    hyper = tuple(map(np.float32, (LR, ALPHA, 1 - ALPHA, EPS)))

    def calls(steps: int) -> None:
        for _ in range(steps):
            for row in rows:
                one(*row, *hyper)

    def parallel_calls(steps: int) -> None:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        for _ in range(steps):
            for row in rows:
                parallel(*row, *hyper)

    return calls if threads == 1 else parallel_calls


def by_numba_at_once(params: Arrays, grads: Arrays, threads: int) -> Contender | None:
    """One call for all tensors, over tuples or typed lists of them.

    These have it easier than in a training loop: they are filled once, not with the
    gradients of each step.
    """
    if not is_installed("numba") or threads > 1 or len(params) == 1:
        return None
    typed_list = import_module("numba.typed").List
    several = _numba_kernels()[1]
    hyper = tuple(map(np.float32, (LR, ALPHA, 1 - ALPHA, EPS)))
    flat = [[x.reshape(-1) for x in arrays] for arrays in (params, grads)]
    flat.append([np.zeros_like(p) for p in flat[0]])

    def at_once(make: Callable[[Arrays], object]) -> Run:
        arrays = tuple(map(make, flat))

        def run(steps: int) -> None:
            for _ in range(steps):
                several(*arrays, *hyper)

        return run

    candidates = {"typed list": at_once(typed_list)}
    if len(params) <= 10:  # each length of a tuple is compiled anew
        candidates["tuple"] = at_once(tuple)
    return fastest(candidates)


def _aligned(numel: int) -> np.ndarray:
    """Zeros that begin at a cache line, which makes the limit a tenth faster."""
    array = np.zeros(numel + 16, np.float32)
    start = -array.ctypes.data % 64 // 4
    return array[start : start + numel]


def limit(
    params: Arrays, grads: Arrays, threads: int, *, clip: bool = False
) -> Contender | None:
    """The five streams with a multiply-add, over one array of as many elements.

    With `clip` six: g is read once more, and its squares added up, before.
    """
    numel, c = sum(p.size for p in params), np.float32(0.5)
    if numel < LIMIT_FROM:
        return None
    p, g, v = (_aligned(numel) for _ in "pgv")
    np.concatenate([g.ravel() for g in grads], out=g)

    if is_installed("numba"):
        numba = import_module("numba")
        kernel = _numba_kernels()[3 if threads == 1 else 4]
        squares = _numba_kernels()[5 if threads == 1 else 6]

        def run(steps: int) -> None:
            if threads > 1:
                numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
            for _ in range(steps):
                if clip:
                    squares(g)
                kernel(p, g, v, c)

        return "numba", run
    if threads > 1 or clip:
        return None
    blocks = [
        [x[start : start + BLOCK] for x in (p, g, v)]
        for start in range(0, numel, BLOCK)
    ]

    def approximate(steps: int) -> None:  # the second read of g comes from the cache
        for _ in range(steps):
            for p, g, v in blocks:
                np.add(p, g, out=p)
                np.add(v, g, out=v)

    return "NumPy", approximate


# A rival is one function more: add it here. It may return None where it does not apply.
RIVALS: dict[str, Factory] = {
    "rmsprop": ours,
    "numpy": functools.partial(by_numpy, plain_update),
    "numpy, tuned": functools.partial(by_numpy, tuned_update),
    "numpy, blocks": by_numpy_blocks,
    "numba": by_numba,
    "numba, at once": by_numba_at_once,
    "limit": limit,
}
