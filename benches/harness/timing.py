"""What a contender is, and how contenders are timed: in turns."""

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

Arrays = list[np.ndarray]
# Performs that many steps. Returns nanoseconds if not all that it did counts.
Run = Callable[[int], int | None]
# Of parameters, gradients and threads; None where it does not apply.
Factory = Callable[[Arrays, Arrays, int], Run | None]
Name = TypeVar("Name", bound=Hashable)
T = TypeVar("T")


class Contender(NamedTuple):
    run: Run
    threads: int = 1  # of torch meanwhile


class LeftOut(Exception):
    """Raised by a factory whose contender takes no part; the message is the reason."""


LR, ALPHA, EPS = 1e-3, 0.99, 1e-8  # everybody's
ROUNDS = 5  # at least
# Seconds after which another's threads sleep: OpenMP's spin after their last loop, with
# libgomp and numba for 11 ms (Zen 5).
ASLEEP = 16e-3
TURN = 50e-3  # seconds: many time slices of the system's scheduler

# Its own: programs that are measured seed that of the module.
_shuffle = random.Random(0).shuffle


def turns(
    contenders: Mapping[Name, T], budget_s: float, rounds: int = ROUNDS
) -> Iterator[tuple[Name, T]]:
    """Gives all in turns until the budget is spent, in another order in each round."""
    names, done = list(contenders), 0
    deadline = time.perf_counter() + budget_s
    while done < rounds or time.perf_counter() < deadline:
        _shuffle(names)  # nobody always comes after the same one
        for name in names:
            yield name, contenders[name]
        done += 1


def sample(run: Run, steps: int) -> float:
    """Microseconds a step."""
    start = time.perf_counter_ns()
    counted = run(steps)
    lasted = time.perf_counter_ns() - start
    return (lasted if counted is None else counted) / steps / 1e3


def measure(
    contenders: Mapping[Name, Contender],
    sample_s: float,
    budget_s: float,
    asleep_s: float = ASLEEP,
) -> dict[Name, list[float]]:
    """Samples that last about so long, in microseconds a step.

    Args:
        asleep_s: a pause before each, so that nobody pays for another's threads.
    """
    steps = {}
    for name, contender in contenders.items():
        _prepare(contender, 0)
        steps[name] = _steps_in(contender.run, sample_s)
    times: dict[Name, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    for name, contender in turns(contenders, budget_s):
        _prepare(contender, asleep_s)
        contender.run(max(1, steps[name] // 4))  # wakes its threads, fills caches
        times[name].append(sample(contender.run, steps[name]))
    gc.enable()
    return times


def measure_steps(
    contenders: Mapping[str, Contender], pause_us: float, budget_s: float
) -> dict[str, list[float]]:
    """Microseconds of single steps, each after a pause in which the caller is at work.

    The calls and the clock add some 0.2 us. In turns as in `measure`, but of `TURN` seconds.
    """
    for contender in contenders.values():
        _prepare(contender, 0)
        contender.run(2)  # compiles, creates threads, touches memory
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    for name, contender in turns(contenders, budget_s):
        _prepare(contender, ASLEEP)
        contender.run(1)
        end = time.perf_counter() + min(TURN, budget_s / ROUNDS)
        while time.perf_counter() < end:
            pause_end = time.perf_counter_ns() + pause_us * 1e3
            while time.perf_counter_ns() < pause_end:
                pass
            times[name].append(sample(contender.run, 1))
    gc.enable()
    return times


def fastest(runs: list[Run]) -> Run:
    """The one with the shortest sample of a short trial."""
    contenders = {run: Contender(run) for run in runs}
    times = measure(contenders, sample_s=2e-3, budget_s=0.15)
    return min(runs, key=lambda run: min(times[run]))


def summary(us: list[float]) -> dict[str, float]:
    """What samples come to, as the JSON has it."""
    return {
        "median_us": statistics.median(us),
        "min_us": min(us),
        "mean_us": statistics.fmean(us),
        "p90_us": statistics.quantiles(us, n=10, method="inclusive")[-1],
        "samples": len(us),
    }


def _prepare(contender: Contender, asleep_s: float) -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(contender.threads)
    time.sleep(asleep_s)


def _steps_in(run: Run, seconds: float) -> int:
    """How many steps last about that long, with what is around them."""
    run(1)  # compiles, creates threads, touches memory
    steps = 1
    while True:
        start = time.perf_counter()
        run(steps)
        lasted = time.perf_counter() - start
        if lasted >= seconds / 4:
            return max(1, round(steps * seconds / lasted))
        steps *= 2
