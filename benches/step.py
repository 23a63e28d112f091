"""Times one step of rmsprop beside the rivals that are installed, in one run.

    python benches/step.py [--quick] [--cases mlp64,1m] [--threads 1,2]

Every contender has its own parameters and state, shares the gradients, and takes its turn
in every round, so that a slow spell of the machine hits all of them. A sample is as many
steps as fill some milliseconds, after one that is not counted. Reported are the median and
the minimum over the rounds, and both divided by ours with the same number of threads.

`limit` reads p, g, v and writes p, v with one multiply-add each: the five streams that any
f32 update of this kind must move. Without numba it is an approximation in NumPy. The exact
one is in `cargo bench`.
"""

import argparse
import functools
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import rmsprop

Arrays = list[np.ndarray]
Run = Callable[[int], None]  # performs that many steps
Contender = tuple[str, Run]  # "" or the form it takes in this case, and how to run it
Factory = Callable[[Arrays, Arrays, int], Contender | None]  # params, grads, threads

LR, ALPHA, EPS = 1e-3, 0.99, 1e-8
LIMIT_FROM = 200_000  # elements: below, calls cost more than memory
# Elements. With --cases 10m the best of 4 Ki to 128 Ki (Zen 5, NumPy 2.4.6, 2026-11).
BLOCK = 64 * 1024


def mlp(*sizes: int) -> list[tuple[int, ...]]:
    """Shapes of a perceptron's weights and biases."""
    return [shape for n, m in pairwise(sizes) for shape in ((n, m), (m,))]


CASES: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "mlp64": ("6 tensors, 4.6 k", mlp(4, 64, 64, 2)),
    "mlp256": ("6 tensors, 269 k", mlp(784, 256, 256, 10)),
    "many": ("1,000 tensors x 100", [(100,)] * 1000),
    "1m": ("1 M", [(1_000_000,)]),
    "10m": ("10 M", [(10_000_000,)]),
    "50m": ("50 M", [(50_000_000,)]),
}


def ours(params: Arrays, grads: Arrays, threads: int) -> Contender:
    step = rmsprop.RMSprop(params, lr=LR, threads=threads).step

    def run(steps: int) -> None:
        for _ in range(steps):
            step(grads=grads)

    return "", run


Rows = list[tuple[np.ndarray, ...]]  # p, g, v and two arrays for what is in between


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


def fastest(candidates: dict[str, Run]) -> Contender:
    """The candidate with the shortest sample of a short trial."""
    times = measure(list(candidates.values()), seconds=2e-3, budget=0.15)
    return min(zip(times, candidates.items()), key=lambda x: min(x[0]))[1]


@functools.cache
def numba_kernels() -> tuple[Callable[..., None], ...]:
    import numba

    # With Python's division, which raises on zero, LLVM could not vectorize the loop.
    jit = functools.partial(numba.njit, error_model="numpy", cache=True)

    @jit
    def one(p, g, v, lr, alpha, one_minus_alpha, eps):
        for i in range(p.size):
            x = g[i]
            s = alpha * v[i] + (one_minus_alpha * x) * x
            v[i] = s
            p[i] -= (lr * x) / np.sqrt(s + eps)

    @jit
    def several(params, grads, square_avg, lr, alpha, one_minus_alpha, eps):
        for k in range(len(params)):
            p, g, v = params[k], grads[k], square_avg[k]
            for i in range(p.size):
                x = g[i]
                s = alpha * v[i] + (one_minus_alpha * x) * x
                v[i] = s
                p[i] -= (lr * x) / np.sqrt(s + eps)

    @jit(parallel=True)
    def parallel(p, g, v, lr, alpha, one_minus_alpha, eps):
        for i in numba.prange(p.size):
            x = g[i]
            s = alpha * v[i] + (one_minus_alpha * x) * x
            v[i] = s
            p[i] -= (lr * x) / np.sqrt(s + eps)

    @jit
    def limit(p, g, v, c):
        for i in range(p.size):
            x = g[i]
            p[i] = p[i] * c + x
            v[i] = v[i] * c + x

    @jit(parallel=True)
    def limit_parallel(p, g, v, c):
        for i in numba.prange(p.size):
            x = g[i]
            p[i] = p[i] * c + x
            v[i] = v[i] * c + x

    return one, several, parallel, limit, limit_parallel


def by_numba(params: Arrays, grads: Arrays, threads: int) -> Contender | None:
    """A fused loop under `njit`, called for each tensor with the gradient it has now."""
    if not find_spec("numba"):
        return None
    import numba

    one, _, parallel, *_ = numba_kernels()
    hyper = tuple(map(np.float32, (LR, ALPHA, 1 - ALPHA, EPS)))
    rows = [
        (p.reshape(-1), g.reshape(-1), np.zeros(p.size, np.float32))
        for p, g in zip(params, grads)
    ]

    def calls(steps: int) -> None:
        for _ in range(steps):
            for row in rows:
                one(*row, *hyper)

    def parallel_calls(steps: int) -> None:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        for _ in range(steps):
            for row in rows:
                parallel(*row, *hyper)

    if threads == 1:
        return "", calls
    return fastest({"serial": calls, "parallel": parallel_calls})


def by_numba_at_once(params: Arrays, grads: Arrays, threads: int) -> Contender | None:
    """One call for all tensors, over tuples or typed lists of them.

    These have it easier than in a training loop: they are filled once, not with the
    gradients of each step.
    """
    if not find_spec("numba") or threads > 1 or len(params) == 1:
        return None
    from numba.typed import List

    several = numba_kernels()[1]
    hyper = tuple(map(np.float32, (LR, ALPHA, 1 - ALPHA, EPS)))
    flat = [[x.reshape(-1) for x in arrays] for arrays in (params, grads)]
    flat.append([np.zeros_like(p) for p in flat[0]])

    def at_once(make: Callable[[Arrays], object]) -> Run:
        arrays = tuple(map(make, flat))

        def run(steps: int) -> None:
            for _ in range(steps):
                several(*arrays, *hyper)

        return run

    candidates = {"typed list": at_once(List)}
    if len(params) <= 10:  # each length of a tuple is compiled anew
        candidates["tuple"] = at_once(tuple)
    return fastest(candidates)


def limit(params: Arrays, grads: Arrays, threads: int) -> Contender | None:
    """The five streams with a multiply-add, over one array of as many elements."""
    numel, c = sum(p.size for p in params), np.float32(0.5)
    if numel < LIMIT_FROM:
        return None
    p, v = np.zeros(numel, np.float32), np.zeros(numel, np.float32)
    g = grads[0] if len(grads) == 1 else np.concatenate([g.ravel() for g in grads])

    if find_spec("numba"):
        import numba

        kernel = numba_kernels()[3 if threads == 1 else 4]

        def run(steps: int) -> None:
            if threads > 1:
                numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
            for _ in range(steps):
                kernel(p, g, v, c)

        return "numba", run
    if threads > 1:
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


def sample(run: Run, steps: int) -> float:
    """Microseconds a step."""
    start = time.perf_counter_ns()
    run(steps)
    return (time.perf_counter_ns() - start) / steps / 1e3


def repeats(run: Run, seconds: float) -> int:
    """How many steps take about that long."""
    run(1)  # compiles, creates threads, touches memory
    steps = 1
    while (lasts := sample(run, steps) * steps / 1e6) < seconds / 4:
        steps *= 2
    return max(1, round(steps * seconds / lasts))


def measure(runs: list[Run], seconds: float, budget: float) -> list[list[float]]:
    """Samples of each run, taken in turns until the budget is spent, five at least."""
    steps, times = [repeats(run, seconds) for run in runs], [[] for _ in runs]
    deadline = time.perf_counter() + budget
    gc.collect()
    gc.disable()
    while len(times[0]) < 5 or time.perf_counter() < deadline:
        for run, n, samples in zip(runs, steps, times):
            # An OpenMP runtime's threads spin for a while after their last loop: let
            # them go to sleep, then warm up caches and our own threads.
            time.sleep(2e-3)
            run(1)
            samples.append(sample(run, n))
    gc.enable()
    return times


def make_case(shapes: list[tuple[int, ...]]) -> tuple[Callable[[], Arrays], Arrays]:
    """A function that makes equal parameters each time, and the gradients."""
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    return lambda: [np.ones(shape, np.float32) for shape in shapes], grads


def check_rivals(threads: list[int]) -> None:
    """All of them compute the same update, or comparing their times means nothing."""
    params, grads = make_case(mlp(20, 300, 100, 2))
    expected: Arrays = []
    for name, factory in RIVALS.items():
        for count in threads:
            arrays = params()
            contender = factory(arrays, grads, count)
            if name == "limit" or contender is None:
                continue
            # Trials may have made steps: start again from the state that they left.
            contender[1](5000)
            for array in arrays:
                array[...] = 1
            contender[1](3)
            expected = expected or [array.copy() for array in arrays]
            for array, wanted in zip(arrays, expected):
                np.testing.assert_allclose(array, wanted, rtol=1e-5, err_msg=name)


def bench(name: str, threads: list[int], quick: bool) -> Iterator[tuple[str, ...]]:
    """Rows of the table for one case."""
    title, shapes = CASES[name]
    params, grads = make_case(shapes)
    contenders = [
        (count, rival, made)
        for count in threads
        for rival, factory in RIVALS.items()
        if (made := factory(params(), grads, count))
    ]
    seconds, budget = (2e-3, 0.8) if quick else (5e-3, 10.0)
    times = measure([run for _, _, (_, run) in contenders], seconds, budget)
    base: dict[int, tuple[float, float]] = {}
    for (count, rival, (form, _)), samples in zip(contenders, times):
        median, least = statistics.median(samples), min(samples)
        base.setdefault(count, (median, least))  # ours comes first
        yield (
            title,
            str(count),
            f"{rival} ({form})" if form else rival,
            digits(median),
            digits(least),
            digits(median / base[count][0]),
            digits(least / base[count][1]),
            str(len(samples)),
        )


def digits(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def machine() -> str:
    """What the figures depend on."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(": ")[1] for x in lines if x.startswith("model name")), cpu)
    versions = [f"Python {platform.python_version()}", f"NumPy {np.__version__}"]
    if find_spec("numba"):
        import numba

        versions.append(f"numba {numba.__version__}")
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    cores = f"{os.cpu_count()} cores"
    return f"{', '.join([cpu, cores, *versions, load])}\nrmsprop {rmsprop.info()}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 seconds, without 50m")
    parser.add_argument("--cases", help=f"comma-separated, of {','.join(CASES)}")
    parser.add_argument("--threads", default="1,2", help="comma-separated")
    args = parser.parse_args()
    default = [name for name in CASES if not (args.quick and name == "50m")]
    args.cases = args.cases.split(",") if args.cases else default
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown cases {sorted(unknown)}, there are {list(CASES)}")
    args.threads = [int(count) for count in args.threads.split(",")]
    return args


def main() -> None:
    args = parse()
    print(machine())
    check_rivals(args.threads)
    line = "{:20}{:>3}  {:23}{:>10}{:>10}{:>8}{:>8}{:>6}".format
    print(
        "\nus a step, median and minimum of n rounds; both divided by ours, as many threads"
    )
    print(line("case", "thr", "rival", "median", "min", "/ ours", "/ ours", "n"))
    for name in args.cases:
        print()
        for row in bench(name, args.threads, args.quick):
            print(line(*row), flush=True)


if __name__ == "__main__":
    main()
