"""Times one step beside those of rivals, case by case.

    python benches/step.py [--cases mlp64,1m] [--threads 1,2] [--front torch]
    python benches/step.py --cases 'backward-*'   # each right after a backward
    python benches/step.py --cases '*-cold'       # each out of cold caches
    python benches/step.py --cases groups,odd,1m-float64

All cases take many minutes. Printed are microseconds a step: median and minimum of n
rounds, both divided by those of the first row, which is ours. All memory is made anew
three times in a table. How it is measured: `benches/harness/__init__.py`.

`groups`: one group and one for each tensor. `odd`: with two tensors more that the core does
not take. `1m-float64`: gradients in another type than the parameters.
"""

from itertools import product

from harness.cases import CASES, FRONTS, check, contenders, fronts, rivals
from harness.report import Report, numbers, parser, some_of
from harness.timing import measure, summary
from rmsprop import info

SAMPLE_S = 5e-3
# Times that all memory is made anew in a table: with 1 M elements, what fits the last
# cache depends on the pages that one gets, for a fifth of the time (Zen 5, 2026-11).
ANEW = 3


def main() -> None:
    asked = parser(__doc__, seconds=5.0)
    add = asked.add_argument
    add("--cases", type=some_of(list(CASES)), metavar="A,B", default=list(CASES))
    add("--front", type=some_of(FRONTS), metavar="A,B", help="arrays, torch")
    add("--threads", type=numbers(1), metavar="N,M", help="1 and all, if left out")
    add("--no-compile", dest="compiled", action="store_false", help="no torch.compile")
    args = asked.parse_args()
    threads = args.threads or sorted({1, info()["threads"]})
    missing: dict[str, str] = {}
    there = fronts(missing)
    asked_fronts = args.front or there
    if unknown := [front for front in asked_fronts if front not in there]:
        asked.error(f"--front: {unknown[0]} is {missing[unknown[0]]}")

    report = Report()
    report.left_out |= missing
    for front in asked_fronts:
        check(front, threads, args.compiled)
    for name, front, count in product(args.cases, asked_fronts, threads):
        case, times = CASES[name], dict[str, list[float]]()
        factories = {
            rival: (factory, count)
            for rival, factory in rivals(front, case, args.compiled).items()
        }
        left_out: dict[str, str] = {}
        for _ in range(ANEW if factories else 0):
            found = contenders(
                *(front, case.shapes, factories),
                left_out=left_out,
                own_grads=case.kind == "clip",
            )
            runs = {rival: contender for rival, contender, _ in found}
            measured = measure(runs, SAMPLE_S, args.seconds / ANEW)
            for rival, samples in measured.items():
                times.setdefault(rival, []).extend(samples)
        report.left_out |= {f"{who} in {name}": why for who, why in left_out.items()}
        if not times:
            continue
        title = f"{name}: {case.title}, {front}, {count} thread{'s' * (count > 1)}, us"
        report.table(title, ("median", "min", "/ ours", "/ ours", "n"))
        ours = summary(times["rmsprop"])
        for rival, samples in times.items():
            row = summary(samples)
            median, least, n = row["median_us"], row["min_us"], row["samples"]
            ratios = median / ours["median_us"], least / ours["min_us"]
            report.row(rival, median, least, *ratios, n)
            place = {"front": front, "case": name, "threads": count}
            report.results.append({**place, "contender": rival, **row})
    report.end(args.json)


if __name__ == "__main__":
    main()
