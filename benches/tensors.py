"""Times what a step costs a tensor: from 1 to 10,000 tensors of 100 f32 each, one thread.

    python benches/tensors.py [--front torch] [--sizes 1,10,100] [--plot tensors.svg]

Printed are nanoseconds a tensor, medians of interleaved rounds. With few tensors that is
mostly the call, divided; with many what a step does for each of them, and from some
thousands on memory as well: 100 elements move 2,000 bytes.

Arrays get their gradients as a list (`grads=`) or as the `.grad` of `rmsprop.Parameter`s;
with `contiguous_params` those were made before the optimizer and lie in its flat buffer, as
they do where a loop writes gradients in place. numba's lists and tuples for one call are
filled once: it has that easier than in a loop.

An asterisk marks another rule than RMSprop's.
"""

import argparse
import shlex
import sys
from functools import partial
from importlib import import_module

import rmsprop
from rmsprop.bench import array_rivals, sweep
from rmsprop.bench.report import digits
from rmsprop.bench.timing import ALPHA, EPS, LR, Arrays, Contender, Factory, measure

ELEMENTS = 100
SIZES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
SAMPLE_S = 5e-3
WIDTH = 11  # of a column


def by_parameters(
    contiguous: bool, params: Arrays, grads: Arrays, threads: int
) -> Contender:
    """Ours, with each gradient in the `.grad` of its parameter."""
    wrapped = [rmsprop.Parameter(p) for p in params]
    for parameter, grad in zip(wrapped, grads):
        parameter.grad = grad
    step = rmsprop.RMSprop(
        wrapped, lr=LR, contiguous_params=contiguous, threads=threads
    ).step

    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return "", run


def contenders(front: str, tensors: int, compiled: bool) -> sweep.Contenders:
    """By name, ours first."""
    found: dict[str, Factory]
    if front == "arrays":
        rivals = ("numpy, tuned", "numba", "numba, at once")
        found = {
            "rmsprop, grads=": array_rivals.ours,
            "rmsprop, .grad": partial(by_parameters, False),
            "rmsprop, contiguous": partial(by_parameters, True),
            **{name: array_rivals.RIVALS[name] for name in rivals},
        }
    else:
        torch_rivals = import_module("rmsprop.bench.torch_rivals")
        known = torch_rivals.rivals("plain", tensors, compiled, False)
        ours = import_module("rmsprop.torch").RMSprop
        flat = partial(ours, alpha=ALPHA, eps=EPS, contiguous_params=True)
        names = ("torch, foreach", "torch", "compiled", "fused SGD*", "fused Adagrad*")
        found = {
            "rmsprop": known["rmsprop"],
            "rmsprop, contiguous": partial(torch_rivals.by_torch, "plain", flat),
            **{name: known[name] for name in names if name in known},
        }
    return {name: (factory, 1) for name, factory in found.items()}


def table(found: sweep.Sweep, front: str, args: argparse.Namespace) -> None:
    """Measures one front."""
    names = list(contenders(front, 1, args.compile > 0))
    title = f"{front}, ns a tensor of {ELEMENTS} elements"
    found.head(title, ("tensors", *names), WIDTH)
    for size in args.sizes:
        made = contenders(front, size, size <= args.compile)
        runs = found.runs(front, [(ELEMENTS,)] * size, made)
        times = measure(list(runs.values()), SAMPLE_S, args.seconds)
        points = found.add(front, "hot", size, dict(zip(runs, times)))
        ns = {name: point.median_us * 1e3 / size for name, point in points.items()}
        cells = (digits(ns[name]) if name in ns else "-" for name in names)
        found.row((f"{size:,}", *cells))


def plot(found: sweep.Sweep, args: argparse.Namespace) -> None:
    """Saves a panel for each front."""
    figure = import_module("matplotlib.figure").Figure(
        figsize=(5.5 * len(found.fronts), 4.5), layout="constrained"
    )
    row = figure.subplots(1, len(found.fronts), squeeze=False, sharey=True)[0]
    for axes, front in zip(row, found.fronts):
        points = (p for p in found.points if p.front == front)
        sweep.draw(axes, points, lambda point: 1e-6 / point.size)
        axes.set_title(f"{front}, 1 thread", fontsize=9, loc="left")
        axes.set_xlabel(f"tensors of {ELEMENTS} elements", fontsize=8)
        sweep.legend(axes)
    row[0].set_ylabel("median time of a step, a tensor", fontsize=8)
    sweep.save(figure, found.about, "* another rule", args.plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sweep.add_arguments(parser, SIZES, "tensors")
    parser.add_argument(
        "--compile", type=int, default=0, metavar="N", help="torch.compile up to N"
    )
    args = parser.parse_args()
    command = shlex.join(["python", "benches/tensors.py", *sys.argv[1:]])
    found = sweep.Sweep(parser, args, command)
    for front in found.fronts:
        table(found, front, args)
    found.end()
    if args.plot:
        plot(found, args)


if __name__ == "__main__":
    main()
