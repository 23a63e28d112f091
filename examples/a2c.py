"""Stable-Baselines3's A2C on CartPole-v1, with torch's RMSprop, SB3's own, and rmsprop's.

    python examples/a2c.py [--plot build/a2c.png]

SB3 takes an optimizer as two entries of `policy_kwargs`, so trying another one is

    from rmsprop import dialect
    from rmsprop.torch import RMSprop

    policy_kwargs = {
        "optimizer_class": RMSprop,
        "optimizer_kwargs": dialect("sb3", eps=1e-5),
    }

Prints how much of the training the optimizer takes and whether the agents learn alike:
each of rmsprop's two runs is compared with the one whose formula it follows, seed by
seed. One torch thread; two minutes. Needs stable-baselines3, matplotlib and tqdm.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import gymnasium
import numpy as np
import torch
from matplotlib.figure import Figure
from rmsprop import dialect
from rmsprop.torch import RMSprop
from stable_baselines3 import A2C
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from tqdm import tqdm

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], Any]] = {
    "torch.optim.RMSprop": (torch.optim.RMSprop, {"eps": 1e-5}),
    "rmsprop": (RMSprop, {"eps": 1e-5}),
    "SB3's RMSpropTFLike": (RMSpropTFLike, {"eps": 1e-5}),
    'rmsprop, dialect("sb3")': (RMSprop, dialect("sb3", eps=1e-5)),
}
PAIRS = (
    ("torch.optim.RMSprop", "rmsprop"),
    ("SB3's RMSpropTFLike", 'rmsprop, dialect("sb3")'),
)
EPISODES = 30  # to take a mean reward over


class Stopwatch:
    """Calls a function and keeps the seconds inside it, call by call."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function, self.seconds = function, list[float]()

    def __call__(self) -> object:
        start = perf_counter()
        result = self.function()
        self.seconds.append(perf_counter() - start)
        return result


@dataclass
class Run:
    """What a training leaves behind: its episodes, and where the time went."""

    rewards: np.ndarray  # of each episode
    ends: np.ndarray  # the environment step at which each episode was over
    steps: int
    seconds: float
    seconds_in_step: list[float]


def train(name: str, seed: int, steps: int) -> Run:
    """Trains a fresh agent; everything random depends on the seed only."""
    kind, options = OPTIMIZERS[name]
    env = Monitor(gymnasium.make("CartPole-v1"))
    kwargs = {"optimizer_class": kind, "optimizer_kwargs": options}
    agent = A2C("MlpPolicy", env, policy_kwargs=kwargs, seed=seed, device="cpu")
    # A2C clips before it calls step() and cannot be told not to, so the clipping stays
    # outside; examples/impala.py shows the optimizer's own `max_grad_norm`.
    watch = Stopwatch(agent.policy.optimizer.step)
    vars(agent.policy.optimizer)["step"] = watch
    start = perf_counter()
    agent.learn(steps)
    return Run(
        seconds=perf_counter() - start,
        steps=agent.num_timesteps,
        seconds_in_step=watch.seconds,
        rewards=np.array(env.get_episode_rewards()),
        ends=np.cumsum(env.get_episode_lengths()),
    )


def parting(a: Run, b: Run) -> int | None:
    """The environment step after which two agents' episodes differ, if they do."""
    if np.array_equal(a.ends, b.ends):
        return None
    episodes = min(len(a.ends), len(b.ends))
    same = np.append(a.ends[:episodes] == b.ends[:episodes], False).argmin()
    return int(a.ends[same - 1]) if same else 0


def report(runs: dict[str, list[Run]]) -> None:
    """Prints where the time went, and whether the agents learnt alike."""
    print(f"{'':25}  optimizer share  us per step  steps/s  last reward")
    for name, rounds in runs.items():
        share = median(sum(run.seconds_in_step) / run.seconds for run in rounds)
        step_us = median(t for run in rounds for t in run.seconds_in_step) * 1e6
        speed = median(run.steps / run.seconds for run in rounds)
        reward = np.mean([run.rewards[-EPISODES:].mean() for run in rounds])
        print(
            f"{name:25}  {share:15.2%}  {step_us:11.1f}  {speed:7,.0f}  {reward:11.1f}"
        )
    nothing = Stopwatch(lambda: None)
    for _ in range(10_000):
        nothing()
    print(
        f"Medians of {min(map(len, runs.values()))} rounds; mean reward of every seed's last {EPISODES} "
        f"episodes. Taking the time adds {median(nothing.seconds) * 1e6:.2f} us to a step."
    )
    for peer, ours in PAIRS:
        steps = [parting(a, b) for a, b in zip(runs[peer], runs[ours])]
        parted = [f"{n:,} (seed {k})" for k, n in enumerate(steps) if n is not None]
        episodes = sum(len(run.ends) for run in runs[ours])
        verdict = f"all {episodes:,} episodes equal"
        if parted:
            verdict = f"episodes differ after step {', '.join(parted)}"
        print(f"{ours} against {peer}: {verdict}")


def plot(runs: dict[str, list[Run]], steps: int, path: Path) -> None:
    """Saves the reward by environment step: the seeds' mean as a line, their range shaded."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    grid = np.linspace(0, steps, 200)
    for axes, pair in zip(figure.subplots(1, 2, sharey=True), PAIRS):
        for name, style in zip(pair, ("-", "--")):
            curves = []
            for run in runs[name]:
                totals = np.cumsum(np.insert(run.rewards, 0, 0.0))
                k = np.arange(1, len(totals))
                first = np.maximum(k - EPISODES, 0)
                means = (totals[k] - totals[first]) / (k - first)
                curves.append(np.interp(grid, run.ends, means))
            low, high = np.min(curves, axis=0), np.max(curves, axis=0)
            (line,) = axes.plot(grid, np.mean(curves, axis=0), style, label=name)
            axes.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, lw=0)
        axes.set(xlabel="environment step", xlim=(0, steps))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    figure.axes[0].set(ylabel=f"reward, mean of {EPISODES} episodes")
    figure.suptitle(
        f"A2C on CartPole-v1, mean and range of {min(map(len, runs.values()))} seeds"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Stable-Baselines3's A2C on CartPole-v1, with torch's RMSprop, SB3's own, and rmsprop's."
    )
    parser.add_argument("--steps", type=int, default=8_000, help="of the environment")
    parser.add_argument("--rounds", type=int, default=5, help="seeds to train with")
    parser.add_argument("--plot", type=Path, help="save the learning curves here")
    args = parser.parse_args()

    torch.set_num_threads(1)  # a network this small is slower with more
    runs: dict[str, list[Run]] = {name: [] for name in OPTIMIZERS}
    for name in OPTIMIZERS:
        train(name, seed=0, steps=100)  # what torch does only once is over then
    # The optimizers take turns, so that a busy moment of the machine meets all of them.
    turns = [(seed, name) for seed in range(args.rounds) for name in OPTIMIZERS]
    for seed, name in tqdm(turns, unit="run"):
        runs[name].append(train(name, seed, args.steps))
    report(runs)
    if args.plot:
        plot(runs, args.steps, args.plot)
        print(f"picture: {args.plot}")


if __name__ == "__main__":
    main()
