"""Times what a step costs a tensor: from 1 to 10,000 tensors of 100 f32 each, one thread.

    python benches/tensors.py [--front torch] [--sizes 1,10,100]

Printed are nanoseconds a tensor, medians of interleaved rounds. With few tensors that is
mostly the call, divided; with many what a step does for each of them, and from some
thousands on memory as well: 100 elements move 2,000 bytes.

Arrays get their gradients as a list (`grads=`) or as the `.grad` of `rmsprop.Parameter`s;
with `contiguous_params` those were made before the optimizer and lie in its flat buffer, as
they do where a loop writes gradients in place. numba's lists and tuples for one call are
filled once: it has that easier than in a loop.

An asterisk marks another rule than RMSprop's.
"""

from functools import partial

from harness import array_rivals
from harness.cases import FRONTS, contenders, fronts
from harness.report import Report, numbers, parser, some_of
from harness.timing import Factory, measure, summary

ELEMENTS = 100
SIZES = [1, 3, 10, 30, 100, 300, 1000, 3000, 10_000]
SAMPLE_S = 5e-3


def factories(front: str) -> dict[str, Factory]:
    """By name, ours first."""
    if front == "arrays":
        rivals = ("numpy, tuned", "numba", "numba, at once")
        return {
            "rmsprop, grads=": array_rivals.ours,
            "rmsprop, .grad": partial(array_rivals.by_parameters, False),
            "rmsprop, contiguous": partial(array_rivals.by_parameters, True),
            **{name: array_rivals.RIVALS[name] for name in rivals},
        }
    from harness import torch_rivals

    known = torch_rivals.rivals("plain", compiled=False)
    flat = partial(torch_rivals.OURS, contiguous_params=True)
    names = ("torch, foreach", "torch", "fused SGD*", "fused Adagrad*")
    return {
        "rmsprop": known["rmsprop"],
        "rmsprop, contiguous": partial(torch_rivals.by_torch, flat),
        **{name: known[name] for name in names},
    }


def main() -> None:
    asked = parser(__doc__, seconds=1.0)
    asked.add_argument("--sizes", type=numbers(1), metavar="N,M", default=SIZES)
    asked.add_argument("--front", type=some_of(FRONTS), metavar="A,B")
    args = asked.parse_args()
    report = Report()
    for front in args.front or fronts(report.left_out):
        found = {name: (factory, 1) for name, factory in factories(front).items()}
        report.table(f"{front}, ns a tensor of {ELEMENTS} elements", list(found))
        for size in args.sizes:
            made = contenders(front, [(ELEMENTS,)] * size, found)
            runs = {name: contender for name, contender, _ in made}
            times = measure(runs, SAMPLE_S, args.seconds)
            rows = {name: summary(samples) for name, samples in times.items()}
            place = {"front": front, "size": size}
            report.results += [
                {**place, "contender": name, **row} for name, row in rows.items()
            ]
            ns = {name: row["median_us"] * 1e3 / size for name, row in rows.items()}
            report.row(f"{size:,} tensors", *(ns.get(name, "-") for name in found))
    report.end(args.json)


if __name__ == "__main__":
    main()
