"""``python -m rmsprop bench``: a step and a training loop beside what is installed.

Contenders take turns; printed are medians. The programs in ``benches/`` measure far more.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from statistics import median
from time import perf_counter
from timeit import timeit
from typing import Any, NamedTuple

import numpy as np

from rmsprop import RMSprop, info, machine

Arrays = list[np.ndarray]
Step = Callable[[Arrays], object]  # of these gradients
Call = Callable[[], object]

HYPER = {"lr": 1e-4, "alpha": 0.99, "eps": 1e-8}
SIZES = {"a step": (784, 256, 256, 10), "a loop": (64, 128, 64, 10)}  # of layers
BATCH, SECONDS, TURN = 32, 3.0, 20  # a turn is so many calls


def run(threads: int) -> int:
    """Measures, prints, and gives the exit status."""
    columns, left_out = [], dict[str, str]()
    print(f"rmsprop {info()['version']}, {info()['isa']}, threads={threads}")
    print(
        f"measuring for {SECONDS * len(SIZES):.0f} seconds, after imports\n", flush=True
    )
    for what in SIZES:
        calls = array_calls(what, threads, left_out)
        columns.append(measure(calls | torch_calls(what, threads, left_out)))
    print(f"{'microseconds, / ours':20}", *(f"{what:>21}" for what in SIZES))
    for name in columns[0]:
        cells = (
            f"{times[name].us:12,.1f}{ratio(times, name):7.2f}x{times[name].mark}"
            for times in columns
        )
        print(f"{name:20}", *cells)
    print("\na step: 6 tensors, 269 k elements; a loop: an update of a perceptron")
    if any(time.mark == "?" for times in columns for time in times.values()):
        print("?: unstable, the median is over three times the minimum")
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    for rival in ("NumPy by hand", "torch.optim"):
        if rival in columns[0]:
            step, loop = (ratio(times, rival) for times in columns)
            print(
                f"Beside {rival}, a step is {step:.2g} times as fast here, and the loop"
                f" {loop:.2f} times."
            )
    return 0


class Time(NamedTuple):
    """The median microseconds of a call, and "?" if they are unstable."""

    us: float
    mark: str


def ratio(times: dict[str, Time], name: str) -> float:
    """How many times as long as ours of its front."""
    ours = "rmsprop.torch" if "torch" in name else "rmsprop"
    return times[name].us / times[ours].us


def measure(calls: dict[str, Call]) -> dict[str, Time]:
    """The time of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = perf_counter() + SECONDS
    while perf_counter() < end:
        for name, call in calls.items():
            call()  # compiles, wakes its threads
            times[name].append(timeit(call, number=TURN) / TURN * 1e6)
    return {
        name: Time(median(found), "?" if median(found) > 3 * min(found) else " ")
        for name, found in times.items()
    }


def arrays(what: str) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Weights and biases, a batch, and what is wanted of it."""
    rng, sizes = np.random.default_rng(0), SIZES[what]
    shapes = [shape for n, m in pairwise(sizes) for shape in ((n, m), (m,))]
    params = [0.1 * rng.standard_normal(shape, np.float32) for shape in shapes]
    x, wanted = (rng.standard_normal((BATCH, sizes[i]), np.float32) for i in (0, -1))
    return params, x, wanted


def backward(params: Arrays, x: np.ndarray, wanted: np.ndarray) -> Arrays:
    """The gradients of half the mean squared error of a perceptron with ReLU."""
    layers, inputs = list(zip(params[::2], params[1::2])), Arrays()
    for w, b in layers:
        inputs.append(np.maximum(x, 0) if inputs else x)
        x = inputs[-1] @ w + b
    d, grads = (x - wanted) / wanted.size, Arrays()
    for (w, _), x in zip(reversed(layers), reversed(inputs)):
        grads[:0] = [x.T @ d, d.sum(axis=0)]
        d = (d @ w.T) * (x > 0)
    return grads


def by_hand(params: Arrays) -> Step:
    lr, alpha, eps = HYPER.values()
    square_avg = [np.zeros_like(p) for p in params]

    def step(grads: Arrays) -> None:
        for p, g, v in zip(params, grads, square_avg):
            v *= alpha
            v += (1 - alpha) * g * g
            p -= lr * g / np.sqrt(v + eps)

    return step


def by_numba(params: Arrays) -> Step:
    lr, alpha, eps = map(np.float32, HYPER.values())
    rest = np.float32(1 - HYPER["alpha"])
    flat = [(p.reshape(-1), np.zeros(p.size, np.float32)) for p in params]

    # With Python's division, which raises on zero, LLVM could not vectorize the loop.
    @import_module("numba").njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def update(p: Any, g: Any, v: Any) -> None:
        for i in range(p.size):
            v[i] = alpha * v[i] + (rest * g[i]) * g[i]
            p[i] -= (lr * g[i]) / np.sqrt(v[i] + eps)

    def step(grads: Arrays) -> None:
        for (p, v), g in zip(flat, grads):
            update(p, g.reshape(-1), v)

    return step


def array_calls(what: str, threads: int, left_out: dict[str, str]) -> dict[str, Call]:
    """What to time, ours first: a step, or a backward and a step."""

    def ours(params: Arrays) -> Step:
        opt = RMSprop(params, **HYPER, threads=threads)  # type: ignore[arg-type]
        return lambda grads: opt.step(grads=grads)

    def call(make: Callable[[Arrays], Step]) -> Call:
        params, *data = arrays(what)
        step, grads = make(params), backward(params, *data)
        if what == "a step":
            return lambda: step(grads)
        return lambda: step(backward(params, *data))

    makers = {"rmsprop": ours, "NumPy by hand": by_hand, "numba's loop": by_numba}
    if not machine.is_installed("numba"):
        left_out[makers.popitem()[0]] = "numba is not installed"
    return {name: call(make) for name, make in makers.items()}


def torch_calls(what: str, threads: int, left_out: dict[str, str]) -> dict[str, Call]:
    """The same in torch."""
    try:
        import torch

        import rmsprop.torch
    except ImportError as error:
        left_out["torch"] = str(error)
        return {}
    torch.set_num_threads(threads)

    def call(kind: Any) -> Call:
        params, *data = arrays(what)
        tensors = [torch.nn.Parameter(torch.from_numpy(p)) for p in params]
        opt, (batch, wanted) = kind(tensors, **HYPER), map(torch.from_numpy, data)

        def update() -> None:
            opt.zero_grad()
            y = (batch @ tensors[0] + tensors[1]).relu() @ tensors[2] + tensors[3]
            error = y.relu() @ tensors[4] + tensors[5] - wanted
            (0.5 * error.square().mean()).backward()
            opt.step()

        update()  # the step alone needs gradients too
        return opt.step if what == "a step" else update

    kinds = {"rmsprop.torch": rmsprop.torch.RMSprop, "torch.optim": torch.optim.RMSprop}
    return {name: call(kind) for name, kind in kinds.items()}
