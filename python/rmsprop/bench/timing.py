"""What a contender is, and how contenders are timed: in turns."""

import gc
import random
import time
from collections.abc import Callable
from itertools import count

import numpy as np

Arrays = list[np.ndarray]
# Performs that many steps. Returns nanoseconds if not all that it did counts.
Run = Callable[[int], int | None]
Contender = tuple[str, Run]  # "" or the form it takes in this case, and how to run it
Factory = Callable[[Arrays, Arrays, int], Contender | None]  # params, grads, threads

# What a step is. "plain": that alone, with the same gradients every time; "clip": that after
# clipping the gradients' norm; "backward": that alone, but each after a real backward.
Kind = str


class LeftOut(Exception):
    """Raised by a factory whose contender takes no part; the message is the reason."""


LR, ALPHA, EPS = 1e-3, 0.99, 1e-8  # everybody's
ROUNDS = 5  # at least
# Seconds after which another's threads sleep: OpenMP's spin after their last loop, with
# libgomp and numba for 11 ms (Zen 5).
ASLEEP = 16e-3
TURN = 50e-3  # seconds: many time slices of the system's scheduler
LIMIT_FROM = 200_000  # elements: below, calls cost more than memory


def sample(run: Run, steps: int) -> float:
    """Microseconds a step."""
    start = time.perf_counter_ns()
    counted = run(steps)
    lasted = time.perf_counter_ns() - start
    return (lasted if counted is None else counted) / steps / 1e3


def repeats(run: Run, seconds: float) -> int:
    """How many steps take about that long."""
    run(1)  # compiles, creates threads, touches memory
    steps = 1
    while (lasts := sample(run, steps) * steps / 1e6) < seconds / 4:
        steps *= 2
    return max(1, round(steps * seconds / lasts))


def measure(runs: list[Run], seconds: float, budget: float) -> list[list[float]]:
    """Samples of each run, taken in turns until the budget is spent, `ROUNDS` at least."""
    steps = [repeats(run, seconds) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    turns = list(zip(runs, steps, times))
    deadline = time.perf_counter() + budget
    gc.collect()
    gc.disable()
    while len(times[0]) < ROUNDS or time.perf_counter() < deadline:
        random.shuffle(turns)  # nobody always comes after the same one
        for run, n, samples in turns:
            time.sleep(ASLEEP)
            run(max(1, n // 4))  # wakes its threads, fills caches
            samples.append(sample(run, n))
    gc.enable()
    return times


def measure_steps(runs: list[Run], pause_us: float, budget: float) -> list[list[float]]:
    """Microseconds of single steps, each after a pause in which the caller is at work.

    The calls and the clock add some 0.2 us. In turns as in `measure`, but of `TURN` seconds.
    """
    for run in runs:
        run(2)  # compiles, creates threads, touches memory
    times: list[list[float]] = [[] for _ in runs]
    turns = list(zip(runs, times))
    deadline = time.perf_counter() + budget
    gc.collect()
    gc.disable()
    for rounds in count():
        if rounds >= ROUNDS and time.perf_counter() > deadline:
            break
        random.shuffle(turns)
        for run, samples in turns:
            time.sleep(ASLEEP)
            run(1)
            end = time.perf_counter() + min(TURN, budget / ROUNDS)
            while time.perf_counter() < end:
                pause_end = time.perf_counter_ns() + pause_us * 1e3
                while time.perf_counter_ns() < pause_end:
                    pass
                samples.append(sample(run, 1))
    gc.enable()
    return times


def fastest(candidates: dict[str, Run]) -> Contender:
    """The candidate with the shortest sample of a short trial."""
    times = measure(list(candidates.values()), seconds=2e-3, budget=0.15)
    return min(zip(times, candidates.items()), key=lambda x: min(x[0]))[1]
