"""Times a step against the size of one tensor, on one thread and on all that there are.

    python benches/threads.py [--front arrays] [--pause 300]
    python benches/threads.py --busy 0,2,4 --sizes 269000,1000000,10000000 [--seconds 5]

`threads=N` allows so many threads; how many a step takes is the library's choice, and below
some size it stays on the caller. Beside `threads=1` that choice should never lose.

Steps follow each other at once ("hot") or after `--pause` us of work on the calling thread
("paced"), as in a loop that computes gradients; threads may have gone to sleep then. That
work touches no memory, so p, g and v stay in the cache if they fit it. Paced steps are
timed singly, which adds 0.2 us, and 1 us to numba on several threads.

With `--busy`, that many processes run an endless loop beside, and all steps are timed
singly. Printed are microseconds, the median, and with `--busy` the mean of the steps in
turns of 50 ms. The mean is what a program gets: a step that waits for a thread that has no
core takes milliseconds, and a median hides it.

An asterisk marks another rule than RMSprop's.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from subprocess import DEVNULL, PIPE, Popen

from harness import array_rivals
from harness.cases import FRONTS, contenders, fronts
from harness.report import Report, numbers, parser, some_of
from harness.timing import Factory, measure, measure_steps, summary
from rmsprop import info

SIZES = [1024 << power for power in range(15)]
SAMPLE_S = 10e-3  # so long that it does not count what the first steps find asleep

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


def factories(front: str, threads: int) -> dict[str, tuple[Factory, int]]:
    """By name, ours first, each with its threads."""
    known: dict[str, Factory]
    if front == "arrays":
        known = {"rmsprop": array_rivals.ours, "numba": array_rivals.by_numba_threads}
    else:
        from harness import torch_rivals

        rivals = torch_rivals.rivals("plain", compiled=False)
        known = {name: rivals[name] for name in ("rmsprop", "fused Adagrad*")}
    return {
        f"{name}, threads={count}": (factory, count)
        for name, factory in known.items()
        for count in (threads, 1)
    }


def main() -> None:
    asked = parser(__doc__, seconds=1.0)
    add = asked.add_argument
    add("--sizes", type=numbers(1), metavar="N,M", default=SIZES, help="elements")
    add("--front", type=some_of(FRONTS), metavar="A,B")
    add("--threads", type=int, default=max(2, info()["threads"]), help="2 or more")
    add("--pause", type=float, default=300.0, metavar="US", help="of a paced loop")
    add("--busy", type=numbers(0), metavar="N,M", help="busy processes beside")
    args = asked.parse_args()
    if args.threads < 2:
        asked.error(f"--threads: expected 2 or more, got {args.threads}")
    report = Report()
    there = args.front or fronts(report.left_out)
    what = "mean_us" if args.busy else "median_us"
    for count in args.busy or [0]:
        with busy(count):
            for front, way in product(there, ("hot", "paced")):
                beside = f", {count} busy" if args.busy else ""
                found = factories(front, args.threads)
                report.table(f"{front}, {way}{beside}, us a step", list(found))
                for size in args.sizes:
                    made = contenders(front, [(size,)], found)
                    runs = {name: contender for name, contender, _ in made}
                    if way == "hot" and not args.busy:
                        times = measure(runs, SAMPLE_S, args.seconds)
                    else:
                        pause_us = args.pause if way == "paced" else 0.0
                        times = measure_steps(runs, pause_us, args.seconds)
                    rows = {name: summary(samples) for name, samples in times.items()}
                    place = {"front": front, "way": way, "busy": count, "size": size}
                    report.results += [
                        {**place, "contender": name, **row}
                        for name, row in rows.items()
                    ]
                    us = {name: row[what] for name, row in rows.items()}
                    report.row(f"{size:,}", *(us.get(name, "-") for name in found))
    report.end(args.json)


if __name__ == "__main__":
    main()
