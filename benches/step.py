"""Times one step of rmsprop beside the rivals that are installed, in one run.

    python benches/step.py [--quick] [--front torch] [--cases mlp64,1m] [--threads 1,2]

Every contender has its own parameters and state, shares the gradients, and takes its turn
in every round, so that a slow spell of the machine hits all of them. A sample is as many
steps as fill some milliseconds, after one that is not counted. Reported are the median and
the minimum over the rounds, and both divided by ours with the same number of threads.

`limit` reads p, g, v and writes p, v with one multiply-add each: the five streams that any
f32 update of this kind must move. Divided by ours it says how close to it ours comes.
Without numba it is an approximation in NumPy. The exact one is in `cargo bench`.

Compiling takes seconds, and of many tensors minutes: `--compile` says for which cases it
is done. An asterisk marks another rule than RMSprop's: Adagrad moves five streams as well,
Adam seven, SGD three.
"""

import argparse
import os
import platform
import statistics
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import array_rivals
import numpy as np
import rmsprop
from timing import Arrays, Factory, Kind, measure

Shapes = list[tuple[int, ...]]
FRONTS = ["arrays", "torch"] if find_spec("torch") else ["arrays"]


class Case(NamedTuple):
    title: str
    shapes: Shapes
    kind: Kind = "plain"  # arrays have no others
    compiled: bool = True  # unless --compile says otherwise


def mlp(*sizes: int) -> Shapes:
    """Shapes of a perceptron's weights and biases."""
    return [shape for n, m in pairwise(sizes) for shape in ((n, m), (m,))]


def resnet50() -> Shapes:
    """Shapes of ResNet-50's parameters, in their order."""

    def block(outputs: int, inputs: int, kernel: int) -> Shapes:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    shapes, inputs = block(64, 3, 7), 64
    for width, depth in zip((64, 128, 256, 512), (3, 4, 6, 3)):
        for layer in range(depth):
            shapes += block(width, inputs, 1) + block(width, width, 3)
            shapes += block(4 * width, width, 1)
            if layer == 0:
                shapes += block(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


MLP64, MLP256 = mlp(4, 64, 64, 2), mlp(784, 256, 256, 10)
CASES = {
    "mlp64": Case("6 tensors, 4.6 k", MLP64),
    "mlp64-backward": Case("4.6 k, after backward", MLP64, "backward"),
    "mlp64-clip": Case("4.6 k, clipped", MLP64, "clip"),
    "mlp256": Case("6 tensors, 269 k", MLP256),
    "mlp256-backward": Case("269 k, after backward", MLP256, "backward"),
    "mlp256-clip": Case("269 k, clipped", MLP256, "clip"),
    "small161": Case("161 tensors x 100", [(100,)] * 161),
    "resnet50": Case("ResNet-50, 25.6 M", resnet50(), compiled=False),
    "many": Case("1,000 tensors x 100", [(100,)] * 1000, compiled=False),
    "1m": Case("1 M", [(1_000_000,)]),
    "10m": Case("10 M", [(10_000_000,)]),
    "10m-clip": Case("10 M, clipped", [(10_000_000,)], "clip"),
    "50m": Case("50 M", [(50_000_000,)], compiled=False),
}


def make_case(front: str, shapes: Shapes) -> tuple[Callable[[], Arrays], Arrays]:
    """A function that makes equal parameters each time, and the gradients."""

    def ones(shape: tuple[int, ...]) -> np.ndarray:
        if front == "arrays":
            return np.ones(shape, np.float32)
        import torch

        return torch.ones(shape).numpy()  # in memory that is aligned as torch does it

    rng = np.random.default_rng(0)
    grads = [ones(shape) for shape in shapes]
    for grad in grads:
        rng.standard_normal(out=grad, dtype=np.float32)
    return lambda: [ones(shape) for shape in shapes], grads


def rivals(front: str, case: Case, compiled: bool) -> dict[str, Factory]:
    """The contenders of one front that fit the case, ours first."""
    if front == "arrays":
        return array_rivals.RIVALS if case.kind == "plain" else {}
    import torch_rivals

    return torch_rivals.rivals(case.kind, len(case.shapes), compiled)


def check_rivals(front: str, name: str, threads: list[int], compiled: bool) -> None:
    """All of them compute the same update, or comparing their times means nothing."""
    case, expected = CASES[name], Arrays()
    for rival, factory in rivals(front, case, compiled).items():
        if rival == "limit" or rival.endswith("*"):
            continue
        for count in threads:
            params, grads = make_case(front, case.shapes)
            arrays = params()
            contender = factory(arrays, grads, count)
            if contender is None:
                continue
            # Trials may have made steps: start again from the state that they left.
            contender[1](2000)
            for array in arrays:
                array[...] = 1
            contender[1](3)
            expected = expected or [array.copy() for array in arrays]
            for array, wanted in zip(arrays, expected):
                np.testing.assert_allclose(array, wanted, rtol=1e-5, err_msg=rival)


def bench(
    front: str, name: str, threads: int, quick: bool, compiled: bool
) -> Iterator[tuple[str, ...]]:
    """Rows of the table for one front, case and number of threads."""
    case = CASES[name]
    params, grads = make_case(front, case.shapes)
    contenders = []
    for rival, factory in rivals(front, case, compiled).items():
        # Torch's clipping writes the gradients: each contender has its own then.
        own = make_case(front, case.shapes)[1] if case.kind == "clip" else grads
        if made := factory(params(), own, threads):
            contenders.append((rival, made))
    if not contenders:
        return
    seconds, budget = (2e-3, 0.4) if quick else (5e-3, 5.0)
    times = measure([run for _, (_, run) in contenders], seconds, budget)
    base = statistics.median(times[0]), min(times[0])  # ours comes first
    for (rival, (form, _)), samples in zip(contenders, times):
        median, least = statistics.median(samples), min(samples)
        yield (
            front,
            case.title,
            str(threads),
            f"{rival} ({form})" if form else rival,
            digits(median),
            digits(least),
            digits(median / base[0]),
            digits(least / base[1]),
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
    versions = [f"Python {platform.python_version()}"]
    versions += [
        f"{name} {version(name)}"
        for name in ("numpy", "numba", "torch")
        if find_spec(name)
    ]
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    cores = f"{os.cpu_count()} cores"
    return f"{', '.join([cpu, cores, *versions, load])}\nrmsprop {rmsprop.info()}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute, without 50m")
    parser.add_argument("--front", default=",".join(FRONTS), help="comma-separated")
    parser.add_argument("--cases", help=f"comma-separated, of {','.join(CASES)}")
    parser.add_argument("--threads", default="1,2", help="comma-separated")
    parser.add_argument("--compile", help="comma-separated cases, or none")
    args = parser.parse_args()
    args.threads = [int(count) for count in args.threads.split(",")]
    args.front = chosen(parser, args.front, FRONTS)
    default = [name for name in CASES if not (args.quick and name == "50m")]
    args.cases = chosen(parser, args.cases, CASES) if args.cases else default
    default = [name for name in CASES if CASES[name].compiled and not args.quick]
    if args.compile:
        args.compile = chosen(parser, args.compile, [*CASES, "none"])
    else:
        args.compile = default
    return args


def chosen(
    parser: argparse.ArgumentParser, given: str, names: Collection[str]
) -> list[str]:
    """The names in a comma-separated list."""
    if unknown := set(given.split(",")) - set(names):
        parser.error(f"unknown {sorted(unknown)}, there are {list(names)}")
    return given.split(",")


def main() -> None:
    args = parse()
    print(machine())
    for front in args.front:
        check_rivals(front, "mlp64", args.threads, "mlp64" in args.compile)
    line = "{:8}{:22}{:>3}  {:24}{:>10}{:>10}{:>8}{:>8}{:>6}".format
    print(
        "\nus a step, median and minimum of n rounds; both divided by ours, as many threads"
    )
    print(
        line("front", "case", "thr", "rival", "median", "min", "/ ours", "/ ours", "n")
    )
    for name, front, count in product(args.cases, args.front, args.threads):
        rows = list(bench(front, name, count, args.quick, name in args.compile))
        if rows:
            print("", *(line(*row) for row in rows), sep="\n", flush=True)


if __name__ == "__main__":
    main()
