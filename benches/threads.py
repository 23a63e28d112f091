"""Times a step against the size of one tensor, on one thread and on all that there are.

    python benches/threads.py [--front arrays] [--way paced --pause 300] [--plot threads.svg]
    python benches/threads.py --busy 0,2,4 --sizes 269000,1000000,10000000 [--seconds 5]

Below some size our steps stay on the caller, however many threads they may use. "rmsprop,
2 threads" is that choice, "1 thread" and "forced" are what it chooses between; the lower
panel of the plot divides its time by the better of these two: 1 is the right choice.

Steps follow each other at once ("hot") or after `--pause` us of work on the calling thread
("paced"), as in a loop that computes gradients; threads may have gone to sleep then. That
work touches no memory, so p, g and v stay in the cache if they fit it. Paced steps are
timed singly, which adds 0.2 us, and 1 us to numba on several threads.

With `--busy`, that many processes run an endless loop beside, and all steps are timed
singly: mean / 90th percentile of the steps in turns of 50 ms. The mean is what a program
gets: a step that waits for a thread that has no core takes milliseconds, and a median hides
it. Printed are microseconds.

An asterisk marks another rule than RMSprop's.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import product
from subprocess import DEVNULL, PIPE, Popen

from rmsprop import _core, info
from rmsprop.bench import array_rivals, sweep
from rmsprop.bench.report import digits
from rmsprop.bench.timing import Arrays, Contender, Factory, measure, measure_steps

SIZES = [1024 << power for power in range(15)]
WAYS = ("hot", "paced")
SAMPLE_S = 10e-3  # so long that it does not count what the first steps find asleep
WIDTH = 15  # of a column
ALONE, FORCED = "rmsprop, 1 thread", "rmsprop, forced"

# It ends with this process even if that is killed.
BUSY = """
import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000):
        pass
"""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Runs that many processes that do nothing but use a core, and kills them."""
    command = (sys.executable, "-c", BUSY, str(os.getpid()))
    running: list[Popen[bytes]] = []
    try:
        for _ in range(count):
            # Ctrl-C goes to them too, and nobody wants their tracebacks.
            running.append(Popen(command, stdout=PIPE, stderr=DEVNULL))
        for process in running:
            assert process.stdout
            process.stdout.readline()  # it has begun
        yield
    finally:
        for process in running:
            process.kill()
            process.communicate()


def forced(
    ours: Factory, params: Arrays, grads: Arrays, threads: int
) -> Contender | None:
    """Ours on that many threads at every size, if there are as many chunks."""
    made = ours(params, grads, threads)
    if made is None:
        return None
    form, run = made

    def run_forced(steps: int) -> int | None:
        _core._force_threads(True)
        try:
            return run(steps)
        finally:
            _core._force_threads(False)

    return form, run_forced


def contenders(front: str, threads: int, compiled: bool) -> sweep.Contenders:
    """By name, ours first: the library's choice, and what it chooses between."""
    known: dict[str, Factory]
    if front == "arrays":
        known = {"rmsprop": array_rivals.ours, "numba": array_rivals.by_numba_threads}
    else:
        torch_rivals = import_module("rmsprop.bench.torch_rivals")
        rivals = torch_rivals.rivals("plain", 1, compiled, False)
        names = ("rmsprop", "fused Adagrad*", "compiled")
        known = {name: rivals[name] for name in names if name in rivals}
    found = {}
    for name, factory in known.items():
        found[f"{name}, {threads} threads"] = factory, threads
        found[f"{name}, 1 thread"] = factory, 1
        if name == "rmsprop":
            found[FORCED] = partial(forced, factory), threads
    return found


def table(
    found: sweep.Sweep, front: str, way: str, title: str, args: argparse.Namespace
) -> None:
    """Measures one front in one way."""
    made = contenders(front, args.threads, args.compile)
    found.head(f"{front}, {title}, us a step", ("elements", *made), WIDTH)
    for size in args.sizes:
        runs = found.runs(front, [(size,)], made)
        if way == "hot" and not args.busy:
            times = measure(list(runs.values()), SAMPLE_S, args.seconds)
        else:
            pause_us = args.pause if way == "paced" else 0.0
            times = measure_steps(list(runs.values()), pause_us, args.seconds)
        points = found.add(front, title, size, dict(zip(runs, times)))
        us = {
            name: f"{digits(point.mean_us)} / {digits(point.p90_us)}"
            if args.busy
            else digits(point.median_us)
            for name, point in points.items()
        }
        found.row((f"{size:,}", *(us.get(name, "-") for name in made)))


def choices(points: list[sweep.Point], threads: int) -> dict[int, float]:
    """By size, the time of what the library chose over that of the better choice."""
    sizes: dict[int, dict[str, float]] = {}
    for point in points:
        sizes.setdefault(point.size, {})[point.contender] = point.median_us
    ours = f"rmsprop, {threads} threads"
    return {size: us[ours] / min(us[ALONE], us[FORCED]) for size, us in sizes.items()}


def plot(found: sweep.Sweep, args: argparse.Namespace) -> None:
    """Saves a column for each way, with two panels for each front."""
    ways = list(dict.fromkeys(point.way for point in found.points))
    count = len(found.fronts)
    figure = import_module("matplotlib.figure").Figure(
        figsize=(3.6 * len(ways) + 1.6, 5 * count + 0.8), layout="constrained"
    )
    grid = figure.subplots(
        2 * count,
        len(ways),
        squeeze=False,
        sharex=True,
        sharey="row",
        height_ratios=[3, 1] * count,
    )
    for (i, front), (j, way) in product(enumerate(found.fronts), enumerate(ways)):
        upper, lower = grid[2 * i, j], grid[2 * i + 1, j]
        points = [p for p in found.points if (p.front, p.way) == (front, way)]
        if args.busy:
            points = [p._replace(median_us=p.mean_us) for p in points]
        sweep.draw(upper, points, lambda _: 1e-6, p90=bool(args.busy))
        upper.set_title(f"{front}, {way}", fontsize=9, loc="left")
        chosen = choices(points, args.threads)
        lower.plot(list(chosen), list(chosen.values()), "o-", color="black", ms=3)
        lower.axhline(1, color="0.6", lw=0.8)
        lower.tick_params(labelsize=7)
        lower.grid(alpha=0.3)
        if j == 0:
            what = "mean" if args.busy else "median"
            upper.set_ylabel(f"{what} time of a step", fontsize=8)
            lower.set_ylabel("choice", fontsize=8)
        if j == len(ways) - 1:
            sweep.legend(upper)
    for axes in grid[-1]:
        axes.set_xlabel("elements", fontsize=8)
    note = f"choice: {args.threads} threads over the better of 1 thread and forced"
    sweep.save(figure, found.about, f"{note}; * another rule", args.plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sweep.add_arguments(parser, SIZES, "elements")
    add = parser.add_argument
    add("--threads", type=int, default=max(2, info()["threads"]), help="2 or more")
    add("--way", choices=WAYS, help="both, if left out")
    add("--pause", type=float, default=300.0, metavar="US", help="of a paced loop")
    add("--busy", type=sweep.numbers(0), metavar="N,M", help="busy processes beside")
    add("--compile", action="store_true", help="torch.compile too")
    args = parser.parse_args()
    if args.threads < 2:
        parser.error(f"--threads: expected 2 or more, got {args.threads}")
    command = shlex.join(["python", "benches/threads.py", *sys.argv[1:]])
    found = sweep.Sweep(parser, args, command)
    for count in args.busy or [0]:
        with busy(count):
            for front, way in product(found.fronts, [args.way] if args.way else WAYS):
                title = f"{way}, {count} busy" if args.busy else way
                table(found, front, way, title, args)
    found.end()
    if args.plot:
        plot(found, args)


if __name__ == "__main__":
    main()
