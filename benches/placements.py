"""Times a step of arrays by where they lie within a page, one thread.

    python benches/placements.py [--elements 200000,269000] [--offsets 0,16,64,1024]

A load that follows a store to the same address modulo 4,096 waits for it, so where arrays
lie decides what a step costs. p and g begin at each pair of `--offsets` bytes behind a page;
where the state lies is up to who allocates it. NumPy puts large arrays 16 bytes into a page,
torch 64. numba's loop steps the same p and g, with state that NumPy made.

Printed is what all pairs come to: microseconds a step at the best, the middle and the worst
of them, the worst over the best, and the middle over that of numba.
"""

from functools import partial
from itertools import product
from statistics import median

import numpy as np
from harness import is_installed
from harness.array_rivals import MOMENTUM, by_numba_threads, ours, placed
from harness.report import Report, numbers, parser
from harness.timing import Contender, Factory, measure, summary

PAGE = 4096
OFFSETS = [0, 16, 64, 256, 1024, 2048, 3072]
SAMPLE_S = 2e-3
FORMS = {
    "plain": (False, False),
    "momentum": (False, True),
    "centered": (True, False),
    "centered, momentum": (True, True),
}
Rows = dict[tuple[int, int], dict[str, float]]  # by the offsets of p and g


def times_by_offsets(
    form: str, numel: int, offsets: list[int], seconds: float
) -> dict[str, Rows]:
    """What each contender took, ours first."""
    centered, momentum = FORMS[form]
    factories: dict[str, Factory] = {
        "rmsprop": partial(
            ours, centered=centered, momentum=MOMENTUM if momentum else 0.0
        ),
        "numba": partial(by_numba_threads, centered=centered, momentum=momentum),
    }
    rng, runs = np.random.default_rng(0), dict[tuple[str, int, int], Contender]()
    for at_p, at_g in product(offsets, repeat=2):
        p, g = placed(numel, at_p, PAGE), placed(numel, at_g, PAGE)
        rng.standard_normal(out=g, dtype=np.float32)
        for name, factory in factories.items():
            if run := factory([p], [g], 1):
                runs[name, at_p, at_g] = Contender(run)
    # Nobody's threads are awake, so no pause before a sample.
    measured = measure(runs, SAMPLE_S, seconds, asleep_s=0)
    found: dict[str, Rows] = {}
    for (name, at_p, at_g), samples in measured.items():
        found.setdefault(name, {})[at_p, at_g] = summary(samples)
    return found


def main() -> None:
    asked = parser(__doc__, seconds=10.0)
    add = asked.add_argument
    add("--elements", type=numbers(1), metavar="N,M", default=[200_000, 269_000])
    add("--offsets", type=numbers(0), metavar="N,M", default=OFFSETS, help="bytes")
    args = asked.parse_args()
    report = Report()
    if not is_installed("numba"):
        report.left_out["numba"] = "not installed"
    for numel in args.elements:
        columns = ("best", "middle", "worst", "worst / best", "/ numba")
        report.table(f"{numel:,} elements, us a step", columns)
        for form in FORMS:
            found = times_by_offsets(form, numel, args.offsets, args.seconds)
            us = {
                name: sorted(row["median_us"] for row in rows.values())
                for name, rows in found.items()
            }
            for name, rows in found.items():
                low, middle, high = us[name][0], median(us[name]), us[name][-1]
                beside = middle / median(us["numba"]) if "numba" in us else "-"
                report.row(f"{form}: {name}", low, middle, high, high / low, beside)
                place = {"form": form, "elements": numel, "contender": name}
                report.results += [
                    {**place, "p_offset": p, "g_offset": g, **row}
                    for (p, g), row in rows.items()
                ]
    report.end(args.json)


if __name__ == "__main__":
    main()
