"""An IMPALA learner on CartPole-v1, in the manner of TorchBeast's monobeast.

    python examples/impala.py [--optimizer torch]
    python examples/impala.py --resume --updates 4000

Forked actors play with a model in shared memory and hand over rollouts in shared memory;
learner threads take turns at the update: V-trace, gradients clipped to norm 40, RMSprop
with TorchBeast's hyperparameters, a learning rate that falls at every update, now and
then a checkpoint. With rmsprop the clipping is part of `step()`. Under a minute on two
cores. Needs gymnasium.

It ends, whatever happens: an actor that dies ends the run, actors whose parent has died
end themselves, and a process without progress for a minute prints its stacks and exits.
"""

import argparse
import faulthandler
import os
import signal
import sys
from collections import deque
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from queue import Empty
from statistics import median
from threading import Event, Lock
from time import perf_counter
from typing import Any

import gymnasium
import torch
from rmsprop.torch import RMSprop
from torch import Tensor, nn
from torch import multiprocessing as mp

ACTORS, LEARNERS, BUFFERS, BATCH, UNROLL = 2, 2, 32, 8, 20
DISCOUNT, VALUE_COST, ENTROPY_COST = 0.99, 0.1, 0.01
LR, MAX_GRAD_NORM = 5e-3, 40.0
TORCHBEAST: dict[str, Any] = {"alpha": 0.99, "eps": 0.01, "momentum": 0}
PATIENCE = 60  # seconds


def watch() -> None:
    """Gives this process `PATIENCE`: if nobody calls again by then, it exits with 1."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)


def net() -> nn.Module:
    """From observations to two logits and a value."""
    layers = nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)
    return nn.Sequential(*layers)


class Shared:
    """In every process: the model that acts, the rollouts, and which are free or full."""

    def __init__(self, learned: nn.Module) -> None:
        self.model = net().share_memory()
        self.model.load_state_dict(learned.state_dict())
        self.rollouts = {
            "observation": torch.zeros(BUFFERS, UNROLL + 1, 4),
            "logits": torch.zeros(BUFFERS, UNROLL, 2),
            "action": torch.zeros(BUFFERS, UNROLL, dtype=torch.int64),
            "reward": torch.zeros(BUFFERS, UNROLL),
            "done": torch.zeros(BUFFERS, UNROLL, dtype=torch.bool),
            "episode_return": torch.zeros(BUFFERS, UNROLL),
        }
        for rollouts in self.rollouts.values():
            rollouts.share_memory_()
        self.context = mp.get_context("fork")
        self.free, self.full = self.context.Queue(), self.context.Queue()


def act(shared: Shared, seed: int) -> None:
    """Plays; fills the rollouts whose numbers come from `free`, until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    parent = os.getppid()
    torch.manual_seed(seed)
    env = gymnasium.make("CartPole-v1")
    rollouts = {key: tensor.numpy() for key, tensor in shared.rollouts.items()}
    (observation, _), episode_return = env.reset(seed=seed), 0.0
    while os.getppid() == parent:
        watch()
        try:
            k = shared.free.get(timeout=1)
        except Empty:
            continue
        if k is None:
            return
        for t in range(UNROLL):
            with torch.no_grad():
                logits = shared.model(torch.from_numpy(observation))[:2]
                action = int(torch.multinomial(logits.softmax(-1), 1))
            rollouts["observation"][k, t] = observation
            rollouts["logits"][k, t] = logits
            rollouts["action"][k, t] = action
            observation, reward, terminated, truncated, _ = env.step(action)
            episode_return += float(reward)
            rollouts["reward"][k, t] = reward
            rollouts["done"][k, t] = terminated or truncated
            rollouts["episode_return"][k, t] = episode_return
            if terminated or truncated:
                (observation, _), episode_return = env.reset(), 0.0
        rollouts["observation"][k, UNROLL] = observation
        shared.full.put(k)


def vtrace(
    rho: Tensor, rewards: Tensor, discounts: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Targets of the values and advantages of the actions (Espeholt et al. 2018).

    All are `[time, batch]`; `values` has one more row, to bootstrap from.
    """
    rho = rho.clamp(max=1)
    deltas = rho * (rewards + discounts * values[1:] - values[:-1])
    targets, correction = values.clone(), torch.zeros_like(values[0])
    for t in reversed(range(len(deltas))):
        correction = deltas[t] + discounts[t] * rho[t] * correction
        targets[t] += correction
    return targets[:-1], rho * (rewards + discounts * targets[1:] - values[:-1])


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits, values = model(batch["observation"]).split((2, 1), -1)
    values = values.squeeze(-1)
    policy, behaviour = logits[:-1].log_softmax(-1), batch["logits"].log_softmax(-1)
    action = batch["action"].unsqueeze(-1)
    log_prob = policy.gather(-1, action).squeeze(-1)
    targets, advantages = vtrace(
        rho=(log_prob.detach() - behaviour.gather(-1, action).squeeze(-1)).exp(),
        rewards=batch["reward"],
        discounts=DISCOUNT * (~batch["done"]).float(),
        values=values.detach(),
    )
    policy_loss = -(log_prob * advantages).sum()
    value_loss = (targets - values[:-1]).square().sum() / 2
    negative_entropy = (policy.exp() * policy).sum()
    total: Tensor = (
        policy_loss + VALUE_COST * value_loss + ENTROPY_COST * negative_entropy
    )
    return total


class Learner:
    """The model in training; several threads may be in `run` at once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.model = args, net()
        params, self.clips_outside = self.model.parameters(), args.optimizer == "torch"
        opt: torch.optim.Optimizer
        if self.clips_outside:
            opt = torch.optim.RMSprop(params, lr=LR, **TORCHBEAST)
        else:
            opt = RMSprop(params, lr=LR, max_grad_norm=MAX_GRAD_NORM, **TORCHBEAST)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            opt, lambda update: max(0.0, 1 - update / args.updates)
        )
        self.opt, self.schedule = opt, schedule
        self.saved: dict[str, Any] = {
            "model": self.model,
            "schedule": schedule,
            "optimizer": opt,
        }
        self.gathering, self.learning, self.stop = Lock(), Lock(), Event()
        self.updates, self.returns = 0, deque[float](maxlen=100)
        self.seconds: list[float] = []  # of each update, and of its clipping and step
        self.seconds_in_step: list[float] = []

    def save(self) -> None:
        """All or nothing: the file is replaced once the new one is whole."""
        checkpoint = {key: part.state_dict() for key, part in self.saved.items()}
        unfinished = self.args.checkpoint.with_suffix(".unfinished")
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint | {"updates": self.updates}, unfinished)
        unfinished.replace(self.args.checkpoint)

    def load(self) -> None:
        checkpoint = torch.load(self.args.checkpoint, weights_only=True)
        self.updates = checkpoint["updates"]
        for key, part in self.saved.items():
            part.load_state_dict(checkpoint[key])

    def is_done(self) -> bool:
        return self.stop.is_set() or self.updates >= self.args.updates

    def run(self, shared: Shared) -> None:
        """What a thread does until the last update, or until told to stop."""
        while batch := self.gather(shared):
            with self.learning:
                if self.is_done():
                    return
                self.learn(batch)
                shared.model.load_state_dict(self.model.state_dict())
                if self.updates % self.args.save_every == 0 or self.is_done():
                    self.save()
                    print(f"update {self.updates:,}: {self.progress()}", flush=True)

    def gather(self, shared: Shared) -> dict[str, Tensor]:
        """Copies full rollouts to a batch `[time, batch, ...]` and frees them."""
        ready: list[int] = []
        with self.gathering:
            while len(ready) < BATCH:
                if self.is_done():
                    return {}
                try:
                    ready.append(shared.full.get(timeout=0.2))
                except Empty:
                    continue
        batch = {key: x[ready].transpose(0, 1) for key, x in shared.rollouts.items()}
        for k in ready:
            shared.free.put(k)
        return batch

    def learn(self, batch: dict[str, Tensor]) -> None:
        start = perf_counter()
        self.opt.zero_grad()
        loss(self.model, batch).backward()
        before = perf_counter()
        if self.clips_outside:
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.opt.step()
        self.seconds_in_step.append(perf_counter() - before)
        self.schedule.step()
        self.updates += 1
        self.returns.extend(batch["episode_return"][batch["done"]].tolist())
        self.seconds.append(perf_counter() - start)

    def progress(self) -> str:
        mean = sum(self.returns) / max(1, len(self.returns))
        return f"mean return {mean:.0f} of the last {len(self.returns)} episodes"


def train(learner: Learner) -> None:
    """Runs the actors and the learner's threads until the last update."""
    shared = Shared(learner.model)
    seeds = range(learner.updates, learner.updates + ACTORS)
    actors = [shared.context.Process(target=act, args=(shared, k)) for k in seeds]
    for actor in actors:
        actor.daemon = True
        actor.start()  # forks, so before this process has a second thread
    pool, seen = ThreadPoolExecutor(LEARNERS), -1
    try:
        for k in range(BUFFERS):
            shared.free.put(k)
        jobs = {pool.submit(learner.run, shared) for _ in range(LEARNERS)}
        while jobs:
            if learner.updates > seen:
                seen = learner.updates
                watch()
            done, jobs = wait(jobs, timeout=0.1, return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()  # raises what its thread raised
            for actor in actors:
                if actor.exitcode is not None:
                    raise RuntimeError(f"{actor.name} ended with {actor.exitcode}")
    finally:
        learner.stop.set()
        pool.shutdown()
        for _ in actors:
            shared.free.put(None)
        for actor in actors:
            actor.join(timeout=2)
            if actor.is_alive():
                actor.terminate()
                actor.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="An IMPALA learner on CartPole-v1, in the manner of TorchBeast's monobeast."
    )
    parser.add_argument("--optimizer", choices=("rmsprop", "torch"), default="rmsprop")
    parser.add_argument("--updates", type=int, default=2000, help="the last one")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/impala.pt"))
    parser.add_argument("--save-every", type=int, default=500, help="updates")
    parser.add_argument("--resume", action="store_true", help="from the checkpoint")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the processes are the parallelism
    torch.manual_seed(0)
    learner = Learner(args)
    if args.resume:
        learner.load()
        print(f"resumed at update {learner.updates:,}")
    if learner.updates >= args.updates:
        parser.error(f"nothing to do: --updates {args.updates} is the last one")
    first, start = learner.updates, perf_counter()
    try:
        train(learner)
    except KeyboardInterrupt:
        learner.save()
        print(f"interrupted at update {learner.updates:,}: {args.checkpoint}")
        sys.exit(130)
    seconds, updates = perf_counter() - start, learner.updates - first
    step, update = median(learner.seconds_in_step), median(learner.seconds)
    print(
        f"{args.optimizer}: {updates / seconds:.1f} updates/s, {update * 1e6:,.0f} us each, "
        f"of which {step * 1e6:,.1f} us ({step / update:.1%}) to clip and step\n"
        f"checkpoint: {args.checkpoint}"
    )


if __name__ == "__main__":
    main()
