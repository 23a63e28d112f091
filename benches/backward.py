"""Times a backward with the optimizer's step after it and in it.

    python benches/backward.py [--width 2048] [--layers 8] [--batch 16] [--threads 1]
    python benches/backward.py --tensors 500,2000,8000   # microseconds for each of them

A perceptron of square layers, by default larger than the last-level cache: 403 MB of
parameters, state and gradients. Every contender trains one of its own; they take turns. A
sample is a backward, the step, and setting the gradients to None; the forward is not in it.
"after" and "in" are where the step is. torch's in the backward is the way of its tutorial:
a hook and an optimizer for each parameter.

Two are without a step: in one the gradients are dropped after the backward, in the other in
it, as soon as they are complete. What is between them no optimizer saves: most of it is that
the system takes the memory of all gradients back and clears it for the next ones, unless
MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ in the environment are larger than they are.

"peak" is measured in processes of their own: how much the greatest resident size exceeds
what was there before the model, parameters and state. That is gradients and what is in
between. "mapped" is the same where every large tensor is a mapping of its own
(MALLOC_MMAP_THRESHOLD_): otherwise the first backward leaves holes between the state that is
made in it, and glibc 2.36 does not use them for the next gradients if tensors are large.

`--tensors` is about what each hook costs: models of so many tensors of one element. That
cost should not depend on how many there are.
"""

import argparse
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import rmsprop.torch
import torch
from harness.report import Report, numbers, parser
from harness.timing import ALPHA, EPS, Contender, Run, measure, summary

Train = Callable[[torch.Tensor], None]  # a backward and a step
Make = Callable[..., torch.optim.Optimizer]

LR = 1e-6  # the loss hardly moves, so that every sample has the same numbers
SAMPLE_S = 5e-3


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


def training(
    name: str, net: torch.nn.Module, forward: Callable[[], torch.Tensor]
) -> Run:
    """That contender's backward and step, the forward not counted."""
    train = CONTENDERS[name](net)

    def run(steps: int) -> int:
        counted = 0
        for _ in range(steps):
            loss = forward()
            start = time.perf_counter_ns()
            train(loss)
            counted += time.perf_counter_ns() - start
        return counted

    return run


def contender(name: str, args: argparse.Namespace) -> tuple[Run, torch.nn.Module]:
    net = perceptron(args)
    batch = torch.randn(args.batch, args.width)
    return training(name, net, lambda: net(batch).square().mean()), net


def of_single_elements(name: str, tensors: int) -> Run:
    net = torch.nn.ParameterList(torch.ones(1) for _ in range(tensors))
    parameters = list(net)
    return training(name, net, lambda: torch.cat(parameters).square().sum())


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


def time_perceptron(report: Report, args: argparse.Namespace, given: list[str]) -> None:
    """The table of one model: milliseconds, and megabytes if they are asked for."""
    check(args)
    runs = {
        name: Contender(contender(name, args)[0], args.threads) for name in CONTENDERS
    }
    times = measure(runs, SAMPLE_S, args.seconds)
    title = f"{args.layers} layers of {args.width}"
    columns = ["median", "min", "/ ours", "n", *(("peak MB", "mapped") * args.peak)]
    report.table(f"{title}, {megabytes(perceptron(args)):.3g} MB, ms", columns)
    ours = summary(next(iter(times.values())))
    for name, samples in times.items():
        row = summary(samples)
        cells = [row["median_us"] / 1e3, row["min_us"] / 1e3]
        cells += [row["median_us"] / ours["median_us"], row["samples"]]
        if args.peak:
            row["peak_mb"] = peak(name, given)
            row["mapped_mb"] = peak(name, given, MALLOC_MMAP_THRESHOLD_="100000")
            cells += [row["peak_mb"], row["mapped_mb"]]
        report.row(name, *cells)
        report.results.append({"contender": name, **row})


def time_tensors(report: Report, args: argparse.Namespace) -> None:
    """The table of models of many small tensors: microseconds for each tensor."""
    names = ("rmsprop, after", "rmsprop, in", "no step, dropped in")
    report.table("tensors of one element, us a tensor", names)
    for size in args.tensors:
        runs = {
            name: Contender(of_single_elements(name, size), args.threads)
            for name in names
        }
        times = measure(runs, SAMPLE_S, args.seconds)
        rows = {name: summary(samples) for name, samples in times.items()}
        cells = (row["median_us"] / size for row in rows.values())
        report.row(f"{size:,} tensors", *cells)
        report.results += [
            {"tensors": size, "contender": name, **row} for name, row in rows.items()
        ]


def main() -> None:
    asked = parser(__doc__, seconds=60.0)
    add = asked.add_argument
    add("--width", type=int, default=2048, help="of each layer")
    add("--layers", type=int, default=8)
    add("--batch", type=int, default=16)
    add("--tensors", type=numbers(1), metavar="N,M", help="in place of layers")
    add("--threads", type=int, default=1)
    add(
        "--peak",
        action=argparse.BooleanOptionalAction,
        default=sys.platform == "linux",
        help="measure memory too",
    )
    add("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = sys.argv[1:]
    args = asked.parse_args(given)
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_here(args.peak_of, args))
        return
    report = Report()
    if args.tensors:
        time_tensors(report, args)
    else:
        time_perceptron(report, args, given)
    options = ("width", "layers", "batch", "threads")
    report.end(args.json, **{key: vars(args)[key] for key in options})


if __name__ == "__main__":
    main()
