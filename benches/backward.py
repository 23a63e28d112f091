"""Times a backward with the optimizer's step after it and in it.

    python benches/backward.py [--width 2048] [--layers 8] [--batch 16] [--threads 1]

A perceptron of square layers, by default larger than the last-level cache: 403 MB of
parameters, state and gradients. Every contender trains one of its own; they take turns as
in `rmsprop.bench`. A sample is a backward, the step, and setting the gradients to None; the
forward is not in it. "after" and "in" are where the step is. torch's in the backward is the
way of its tutorial: a hook and an optimizer for each parameter.

Two are without a step: in one the gradients are dropped after the backward, in the other in
it, as soon as they are complete. What is between them no optimizer saves: most of it is that
the system takes the memory of all gradients back and clears it for the next ones, unless
MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ in the environment are larger than they are.

"peak" is measured in processes of their own: how much the greatest resident size exceeds
what was there before the model, parameters and state. That is gradients and what is in
between. "mapped" is the same where every large tensor is a mapping of its own
(MALLOC_MMAP_THRESHOLD_): otherwise the first backward leaves holes between the state that is
made in it, and glibc 2.36 does not use them for the next gradients if tensors are large.
"""

import argparse
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rmsprop.torch
import torch
from rmsprop.bench import report, timing
from rmsprop.bench.timing import ALPHA, EPS, Run

Train = Callable[[torch.Tensor], None]  # a backward and a step
Make = Callable[..., torch.optim.Optimizer]

LR = 1e-6  # the loss hardly moves, so that every sample has the same numbers
WIDTHS = (10, 10, 8, 6, 9, 9)  # of the columns after the name


def without_step(net: torch.nn.Module) -> Train:
    def train(loss: torch.Tensor) -> None:
        loss.backward()
        net.zero_grad()

    return train


def dropped_in_backward(net: torch.nn.Module) -> Train:
    def hook(p: torch.Tensor) -> None:
        p.grad = None

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(hook)
    return torch.Tensor.backward


def after(make: Make, net: torch.nn.Module) -> Train:
    opt = make(net.parameters(), lr=LR, alpha=ALPHA, eps=EPS)

    def train(loss: torch.Tensor) -> None:
        loss.backward()
        opt.step()
        opt.zero_grad()

    return train


def ours_in_backward(net: torch.nn.Module) -> Train:
    opt = rmsprop.torch.RMSprop(net.parameters(), lr=LR, alpha=ALPHA, eps=EPS)
    opt.step_in_backward()

    def train(loss: torch.Tensor) -> None:
        loss.backward()
        opt.step()  # of nothing, as in a loop with a scheduler

    return train


def theirs_in_backward(net: torch.nn.Module) -> Train:
    make = functools.partial(torch.optim.RMSprop, lr=LR, alpha=ALPHA, eps=EPS)
    optimizers = {p: make([p]) for p in net.parameters()}

    def hook(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(hook)
    return torch.Tensor.backward


# Ours first: everything is divided by the one after the backward.
CONTENDERS: dict[str, Callable[[torch.nn.Module], Train]] = {
    "rmsprop, after": functools.partial(after, rmsprop.torch.RMSprop),
    "rmsprop, in": ours_in_backward,
    "torch, after": functools.partial(
        after, functools.partial(torch.optim.RMSprop, foreach=False)
    ),
    "torch foreach, after": functools.partial(
        after, functools.partial(torch.optim.RMSprop, foreach=True)
    ),
    "torch, in": theirs_in_backward,
    "no step, dropped after": without_step,
    "no step, dropped in": dropped_in_backward,
}


def perceptron(args: argparse.Namespace) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for _ in range(args.layers):
        layers += [torch.nn.Linear(args.width, args.width), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers)


def contender(name: str, args: argparse.Namespace) -> tuple[Run, torch.nn.Module]:
    net = perceptron(args)
    batch = torch.randn(args.batch, args.width)
    train = CONTENDERS[name](net)

    def run(steps: int) -> int:
        counted = 0
        for _ in range(steps):
            loss = net(batch).square().mean()
            start = time.perf_counter_ns()
            train(loss)
            counted += time.perf_counter_ns() - start
        return counted

    return run, net


def check(args: argparse.Namespace) -> None:
    """All of them compute the same update, or comparing their times means nothing."""
    small = argparse.Namespace(**{**vars(args), "width": 32})
    start = [p.detach() for p in perceptron(small).parameters()]
    moves = []
    for name in CONTENDERS:
        if not name.startswith("no step"):
            run, net = contender(name, small)
            run(3)
            ends = (p.detach() for p in net.parameters())
            moves.append(torch.cat([(p - q).ravel() for p, q in zip(ends, start)]))
    for move in moves:
        torch.testing.assert_close(move, moves[0], rtol=0.01, atol=LR / 10)


def resident_mb() -> float:
    """The greatest so far. (That of `resource` is also the parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) * 1024 / 1e6


def peak_here(name: str, args: argparse.Namespace) -> float:
    """What the process of `peak` does."""
    run, _ = contender(name, argparse.Namespace(width=8, layers=1, batch=1))
    run(3)  # imports what optimizers need
    before = resident_mb()
    run, net = contender(name, args)
    run(3)
    arrays = 1 if name.startswith("no step") else 2  # the parameters, square_avg
    return resident_mb() - before - arrays * megabytes(net)


def peak(name: str, given: list[str], **environment: str) -> float:
    """Megabytes at the peak besides parameters and state."""
    printed = subprocess.run(
        (sys.executable, __file__, *given, "--peak-of", name),
        check=True,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(printed.stdout)


def megabytes(net: torch.nn.Module) -> float:
    return sum(p.nbytes for p in net.parameters()) / 1e6


def line(name: str, *cells: str) -> str:
    return f"  {name:24}" + "".join(x.rjust(width) for x, width in zip(cells, WIDTHS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048, help="of each layer")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="to go on sampling")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--peak",
        action=argparse.BooleanOptionalAction,
        default=sys.platform == "linux",
        help="measure memory too",
    )
    parser.add_argument("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = sys.argv[1:]
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_here(args.peak_of, args))
        return
    try:
        report.check_folder("--json", args.json or Path())
    except ValueError as error:
        parser.error(str(error))

    about = report.context(shlex.join(["python", "benches/backward.py", *given]))
    print(report.headline(about))
    size = report.digits(megabytes(perceptron(args)))
    print(f"{args.layers} layers of {args.width}: {size} MB of parameters")
    check(args)
    runs = [contender(name, args)[0] for name in CONTENDERS]
    times = timing.measure(runs, 5e-3, args.seconds)
    medians = [statistics.median(samples) / 1e3 for samples in times]
    results = []
    header = ["median", "min", "/ ours", "n", *(("peak MB", "mapped") * args.peak)]
    print("\n" + line("ms", *header))
    for name, samples, median in zip(CONTENDERS, times, medians):
        row: dict[str, Any] = {
            "contender": name,
            "median_ms": median,
            "min_ms": min(samples) / 1e3,
            "median_ratio": median / medians[0],
            "samples": len(samples),
        }
        if args.peak:
            row["peak_mb"] = peak(name, given)
            row["mapped_mb"] = peak(name, given, MALLOC_MMAP_THRESHOLD_="100000")
        cells = [
            f"{x:,}" if isinstance(x, int) else report.digits(x)
            for x in list(row.values())[1:]
        ]
        print(line(name, *cells), flush=True)
        results.append(row)
    if args.json:
        options = {
            key: vars(args)[key] for key in ("width", "layers", "batch", "threads")
        }
        document = {**about, **options, "results": results}
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
