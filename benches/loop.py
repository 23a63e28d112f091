"""Times whole training loops, and what the optimizer and clipping take of them.

    python benches/loop.py [--loops a2c,conv] [--seconds 20] [--json FILE]

a2c      Stable-Baselines3's A2C on CartPole-v1 with its defaults, environment included
a2c-sb3  the same with RMSpropTFLike, which SB3 recommends where training is unstable
impala   the learner of examples/impala.py, alone: it takes rollouts that an actor has
         recorded, learns, and hands over the model
digits   the NumPy perceptron of examples/digits.py, which does not clip
conv     two convolutions and a linear layer in torch, on the same images
numpy-1m, numpy-4m, numpy-12m
         three square layers in NumPy with so many elements, batches of 64; their BLAS has
         two threads, and ours one or two. The others have one thread each.

The first contender is what such a loop has without rmsprop. A sample is a new training
from the same seed: some updates that do not count, after which the parameters must be
those of the first contender, then as many as fill some time. Contenders take turns, in
another order in every round. Printed are medians over the rounds, in us an update; the
speedup is that of the whole loop over the first contender's, with its quartiles.
`benches/picture.py` draws them.

For torch's optimizers `clip_grad_norm_` clips; rmsprop does it in the step, and its time
includes that. A2C cannot be told not to clip: "SB3 clips" is what changing the optimizer
alone gives, and for "rmsprop" its `clip_grad_norm_` is replaced by one that does nothing.
What that one takes is what taking a time adds to each.

`foreach=True` made no difference to torch's loops: 0.98 to 1.00 (torch 2.15, 2026-11).
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from harness import is_installed
from harness.report import Report, digits, parser, some_of
from harness.timing import turns
from rmsprop import RMSprop, dialect

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SEED, SAMPLE_S, WARM_UP = 0, 0.2, 20  # updates that do not count
# Of the parameters after these. They have moved by 0.003 to 0.4 then, contenders have
# differed by 4e-7 at most, and by 0.03 at least when one did not clip.
TOLERANCE = 1e-5
Row = dict[str, Any]  # what was measured of a contender, for the JSON


class Training(NamedTuple):
    """A training before its first update; all that is random in it depends on `SEED`."""

    run: Callable[[int], object]  # performs so many updates
    optimizer: Any
    parameters: list[np.ndarray]  # in the memory of the model
    clip: Callable[..., object] | None = None  # what clip_grad_norm_ is meanwhile


Start = Callable[[], Training]
Contenders = dict[str, Start]  # the first is what there is without rmsprop


class Stopwatch:
    """Calls a function and adds up the nanoseconds inside it."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function, self.ns = function, 0

    def __call__(self, *args: object) -> object:
        start = time.perf_counter_ns()
        result = self.function(*args)
        self.ns += time.perf_counter_ns() - start
        return result


def a2c(recommended: bool = False) -> Contenders:
    import torch
    from rmsprop.torch import RMSprop
    from stable_baselines3 import A2C
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

    original, eps, max_norm = torch.nn.utils.clip_grad_norm_, 1e-5, 0.5  # A2C's

    def start(kind: type, **options: object) -> Training:
        policy = {"optimizer_class": kind, "optimizer_kwargs": options}
        agent = A2C(
            "MlpPolicy", "CartPole-v1", policy_kwargs=policy, seed=SEED, device="cpu"
        )

        def run(updates: int) -> None:
            agent.learn(updates * agent.n_steps, reset_num_timesteps=False)

        clip = (lambda *_: None) if "max_grad_norm" in options else original
        return Training(run, agent.policy.optimizer, arrays(agent.policy), clip)

    if recommended:
        stock = {"RMSpropTFLike": partial(start, RMSpropTFLike, eps=eps)}
        ours = partial(start, RMSprop, **dialect("sb3", eps=eps))
    else:
        stock = {"torch": partial(start, torch.optim.RMSprop, eps=eps)}
        ours = partial(start, RMSprop, eps=eps)
    clips = partial(ours, max_grad_norm=max_norm)
    return {**stock, "rmsprop, SB3 clips": ours, "rmsprop": clips}


def impala() -> Contenders:
    import torch

    example = import_module("impala")
    torch.manual_seed(SEED)
    recorded = example.Shared(example.net())
    for k in (*range(example.BUFFERS), None):
        recorded.free.put(k)
    torch.set_num_threads(1)  # a fork does not have the other ones
    actor = recorded.context.Process(target=example.act, args=(recorded, SEED))
    actor.start()
    actor.join()  # it ends, whatever happens
    if actor.exitcode:
        raise RuntimeError(f"{actor.name} ended with {actor.exitcode}")

    def start(optimizer: str) -> Training:
        torch.manual_seed(SEED)
        args = argparse.Namespace(optimizer=optimizer, updates=1_000_000)  # no end
        learner = example.Learner(args)
        shared = example.Shared(learner.model)
        shared.rollouts = recorded.rollouts
        shared.free = shared.full  # so that each of them comes again
        for k in range(example.BUFFERS):
            shared.full.put(k)

        def run(updates: int) -> None:
            for _ in range(updates):
                learner.learn(learner.gather(shared))
                shared.model.load_state_dict(learner.model.state_dict())

        clip = torch.nn.utils.clip_grad_norm_
        return Training(run, learner.opt, arrays(learner.model), clip)

    return {name: partial(start, name) for name in ("torch", "rmsprop")}


def numpy_digits() -> Contenders:
    example = import_module("digits")
    images, _, labels, _ = example.load()

    def start(kind: type) -> Training:
        net = example.Perceptron(SEED)
        opt = kind(net.parameters(), lr=example.LR)
        data = batches(images, labels, example.BATCH)

        def run(updates: int) -> None:
            for x, y in islice(data, updates):
                _, d = example.cross_entropy(net.forward(x), y)
                net.backward(d)
                opt.step()

        return Training(run, opt, [p.data for p in net.parameters()])

    by_hand = partial(start, example.ByHand)
    return {"NumPy by hand": by_hand, "rmsprop": partial(start, RMSprop)}


def conv() -> Contenders:
    import torch
    from rmsprop.torch import RMSprop
    from torch import nn

    x_train, _, y_train, _ = import_module("digits").load()
    images = torch.from_numpy(x_train.reshape(-1, 1, 8, 8))
    labels, max_norm = torch.from_numpy(y_train), 1.0

    def start(kind: type, **options: object) -> Training:
        torch.manual_seed(SEED)
        net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 10)),
        )
        opt = kind(net.parameters(), lr=1e-3, **options)
        data = batches(images, labels, size=64)

        def run(updates: int) -> None:
            for x, y in islice(data, updates):
                opt.zero_grad()
                loss: Any = nn.functional.cross_entropy(net(x), y)
                loss.backward()
                if "max_grad_norm" not in options:
                    nn.utils.clip_grad_norm_(net.parameters(), max_norm)
                opt.step()

        return Training(run, opt, arrays(net), nn.utils.clip_grad_norm_)

    ours = partial(start, RMSprop, max_grad_norm=max_norm)
    return {"torch": partial(start, torch.optim.RMSprop), "rmsprop": ours}


def numpy_layers(width: int) -> Contenders:
    example = import_module("digits")
    rng = np.random.default_rng(SEED)
    x, wanted = rng.standard_normal((2, 64, width), dtype=np.float32)

    def start(kind: type, **options: object) -> Training:
        net = example.Perceptron(SEED, (width,) * 4)
        opt = kind(net.parameters(), lr=1e-6, **options)

        def run(updates: int) -> None:
            for _ in range(updates):
                net.backward((net.forward(x) - wanted) / len(x))
                opt.step()

        return Training(run, opt, [p.data for p in net.parameters()])

    return {
        "NumPy by hand": partial(start, example.ByHand),
        "rmsprop, threads=1": partial(start, RMSprop, threads=1),
        "rmsprop, threads=2": partial(start, RMSprop, threads=2),
    }


class Loop(NamedTuple):
    contenders: Callable[[], Contenders]
    threads: int = 1  # of torch, of BLAS, and of rmsprop at most


LOOPS = {
    "a2c": Loop(a2c),
    "a2c-sb3": Loop(partial(a2c, recommended=True)),
    "impala": Loop(impala),
    "digits": Loop(numpy_digits),
    "conv": Loop(conv),
    "numpy-1m": Loop(partial(numpy_layers, 592), 2),
    "numpy-4m": Loop(partial(numpy_layers, 1200), 2),
    "numpy-12m": Loop(partial(numpy_layers, 2000), 2),
}


def arrays(model: Any) -> list[np.ndarray]:
    """The parameters of a model of torch, in its memory."""
    return [p.detach().numpy() for p in model.parameters()]


def batches(images: Any, labels: Any, size: int) -> Iterator[tuple[Any, Any]]:
    """Mini-batches in random order, without end."""
    rng, cuts = np.random.default_rng(SEED), range(size, len(images), size)
    while True:
        for rows in np.split(rng.permutation(len(images)), cuts):
            yield images[rows], labels[rows]


def limit_threads(count: int) -> None:
    """Those of torch, of NumPy's BLAS and of rmsprop, as far as they are there."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)
    if is_installed("threadpoolctl"):  # scikit-learn brings it
        import_module("threadpoolctl").threadpool_limits(count)


def sample(start: Start, updates: int) -> tuple[dict[str, float], list[np.ndarray]]:
    """Times so many updates of a new training; gives the parameters before them too."""
    training = start()
    clip = Stopwatch(training.clip or nullcontext)
    place = "torch.nn.utils.clip_grad_norm_"  # where all loops look for it
    with patch(place, clip) if training.clip else nullcontext():
        training.run(WARM_UP)
        parameters = [array.copy() for array in training.parameters]
        # Not earlier: a scheduler warns if at its first step this is not its wrapper.
        step = training.optimizer.step = Stopwatch(training.optimizer.step)
        clip.ns = 0
        gc.disable()
        begin = time.perf_counter_ns()
        training.run(updates)
        total = time.perf_counter_ns() - begin
        gc.enable()
    times = {"update_us": total / updates / 1e3}
    for name, watch in (("step", step), ("clip", clip)):
        times[f"{name}_us"] = watch.ns / updates / 1e3
        times[f"{name}_share"] = watch.ns / total
    return times, parameters


def measure(contenders: Contenders, seconds: float, rounds: int) -> list[Row]:
    """Samples all in turns until the budget is spent, `rounds` at least.

    Raises:
        AssertionError: one does not learn what the first does.
    """
    first, *_ = contenders
    trials = {name: sample(start, WARM_UP) for name, start in contenders.items()}
    keys, wanted = trials[first]
    sample_s = min(SAMPLE_S, seconds / rounds / len(contenders))
    fastest = min(times["update_us"] for times, _ in trials.values())
    updates = max(1, round(sample_s * 1e6 / fastest))
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for name, start in turns(contenders, seconds, rounds):
        times, parameters = sample(start, updates)
        for ours, peer in zip(parameters, wanted):
            np.testing.assert_allclose(ours, peer, 0, TOLERANCE, err_msg=name)
        samples[name].append(times)
    rows = []
    for name, found in samples.items():
        row: Row = {"contender": name, "rounds": len(found), "updates": updates}
        row |= {key: median(times[key] for times in found) for key in keys}
        pairs = zip(samples[first], found)
        ratios = [peer["update_us"] / ours["update_us"] for peer, ours in pairs]
        low, row["speedup"], high = quantiles(ratios, n=4, method="inclusive")
        rows.append({**row, "speedup_quartiles": (low, high)})
    return rows


def show(report: Report, loop: str, rows: list[Row]) -> None:
    """Prints the table of one loop."""
    title = f"{loop}: {rows[0]['rounds']} rounds of {rows[0]['updates']} updates, us"
    columns = ("update", "step", "share", "clip", "share", "speedup", "quartiles")
    report.table(title, columns)
    for row in rows:
        cells: list[str | float] = [row["update_us"]]
        for us, share in (("step_us", "step_share"), ("clip_us", "clip_share")):
            cells += (row[us], f"{row[share]:.1%}") if row[us] else ("-", "-")
        if row is not rows[0]:
            low, high = map(digits, row["speedup_quartiles"])
            cells += (row["speedup"], f"{low}-{high}")
        report.row(row["contender"], *cells)


def measure_loops(
    report: Report, loops: list[str], seconds: float, rounds: int = 5
) -> None:
    """Measures these and adds what was found to the report."""
    sys.path.insert(0, str(EXAMPLES))
    for loop in loops:
        try:
            contenders = LOOPS[loop].contenders()
        except ImportError as error:
            report.left_out[loop] = str(error)
            continue
        threads = LOOPS[loop].threads
        limit_threads(threads)
        rows = measure(contenders, seconds, rounds)
        show(report, loop, rows)
        report.results += [{"loop": loop, "threads": threads, **row} for row in rows]


def main() -> None:
    asked = parser(__doc__, seconds=20.0)
    add = asked.add_argument
    add("--loops", type=some_of(list(LOOPS)), default=list(LOOPS), metavar="A,B")
    add("--rounds", type=int, default=5, help="at least")
    args = asked.parse_args()
    if args.rounds < 2:
        asked.error("--rounds: expected 2 or more")
    report = Report("stable_baselines3")
    measure_loops(report, args.loops, args.seconds, args.rounds)
    report.end(args.json)


if __name__ == "__main__":
    main()
