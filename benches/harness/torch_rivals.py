"""The front for torch and its rivals: torch's RMSprop, compiled or not, and the nearest
optimizers that torch has a fused CPU kernel of."""

import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import count, islice
from typing import Any

import rmsprop.torch
import torch
from torch import Tensor
from torch.optim import Optimizer

from harness.array_rivals import limit
from harness.timing import ALPHA, EPS, LR, Arrays, Factory, LeftOut, Run

Step = Callable[[], object]
Make = Callable[..., Optimizer]  # parameters or groups, lr
Way = Callable[[Step, Optimizer, list[Tensor]], Run]

MAX_NORM = 1.0
BATCH = 64
WARM_UP = 12  # steps: torch compiles for eight values of lr, and gives up

# Typed as Any where torch's own types lag behind.
_torch: Any = torch
_torch._logging.set_logs(dynamo=logging.ERROR)  # no warning of that

OURS = partial(rmsprop.torch.RMSprop, alpha=ALPHA, eps=EPS)
STOCK = partial(torch.optim.RMSprop, alpha=ALPHA, eps=EPS)
FOREACH = partial(STOCK, foreach=True)


def rivals(kind: str, compiled: bool) -> dict[str, Factory]:
    """Those of cases of that kind, ours first; none if torch has no such cases."""
    if kind in ("plain", "cold", "backward"):
        way = after_backward if kind == "backward" else repeated
        rival = partial(partial, by_torch, way=way)
        return {
            "rmsprop": rival(OURS),
            "torch": rival(partial(STOCK, foreach=False)),
            "torch, foreach": rival(FOREACH),
            **({"compiled": rival(STOCK, compiled=True)} if compiled else {}),
            "fused Adagrad*": rival(partial(torch.optim.Adagrad, fused=True)),
            "fused Adam*": rival(partial(torch.optim.Adam, fused=True)),
            "fused SGD*": rival(partial(torch.optim.SGD, fused=True)),
            **({"limit": limit} if kind == "plain" else {}),
        }
    rival = partial(partial, by_torch)
    if kind == "clip":
        ours = rival(partial(OURS, max_grad_norm=MAX_NORM))
        rival = partial(rival, clipping=True)
        return {
            "rmsprop": ours,
            "torch": rival(partial(STOCK, foreach=False)),
            "torch, foreach": rival(FOREACH),
            **({"compiled": rival(STOCK, compiled=True)} if compiled else {}),
            "limit": partial(limit, clip=True),
        }
    if kind == "schedule":
        rival = partial(rival, way=scheduled)
        found: dict[str, Factory] = {"rmsprop": rival(OURS)}
        found["torch, foreach"] = rival(FOREACH)
        if compiled:
            found["compiled"] = rival(STOCK, compiled=True)
            found["compiled, 0-d lr"] = rival(
                STOCK, compiled=True, way=scheduled_in_place
            )
        return found
    if kind == "groups":
        return {
            "rmsprop": rival(OURS),
            "rmsprop, a group each": rival(OURS, arrange=a_group_each),
            "torch, foreach": rival(FOREACH),
            "torch, foreach, a group each": rival(FOREACH, arrange=a_group_each),
        }
    if kind == "odd":
        return {
            "rmsprop": rival(OURS),
            "rmsprop, two odd ones more": rival(OURS, arrange=with_odd_ones),
            "torch, foreach": rival(FOREACH),
            "torch, foreach, two odd ones more": rival(FOREACH, arrange=with_odd_ones),
        }
    return {}


def a_group_each(tensors: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": [tensor]} for tensor in tensors]


def with_odd_ones(tensors: list[Tensor]) -> list[Tensor]:
    """And two of types that the core does not take."""
    odd = [torch.zeros(100, dtype=t) for t in (torch.complex64, torch.float16)]
    for tensor in odd:
        tensor.grad = torch.ones_like(tensor)
    return [*tensors, *odd]


def repeated(step: Step, optimizer: Optimizer, tensors: list[Tensor]) -> Run:
    """The same gradients and hyperparameters every time."""

    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return run


def scheduled(step: Step, optimizer: Optimizer, tensors: list[Tensor]) -> Run:
    """Another lr in every step."""
    (group,) = optimizer.param_groups
    schedule = (LR * (1 + 1e-12 * i) for i in count())

    def run(steps: int) -> None:
        for group["lr"] in islice(schedule, steps):
            step()

    return run


def scheduled_in_place(step: Step, optimizer: Optimizer, tensors: list[Tensor]) -> Run:
    """The same with a tensor that is filled with it, for which torch compiles once."""
    (group,) = optimizer.param_groups
    group["lr"] = torch.tensor(LR)
    schedule = (LR * (1 + 1e-12 * i) for i in count())

    def run(steps: int) -> None:
        for lr in islice(schedule, steps):
            group["lr"].fill_(lr)
            step()

    return run


def after_backward(step: Step, optimizer: Optimizer, tensors: list[Tensor]) -> Run:
    """Each step right after a perceptron's real backward, and only the steps timed."""
    for tensor in tensors:
        torch.nn.init.normal_(tensor, std=tensor.shape[0] ** -0.5)
    batch = torch.randn(BATCH, tensors[0].shape[0])
    target = torch.randn(BATCH, tensors[-1].shape[0])

    def run(steps: int) -> int:
        counted = 0
        for _ in range(steps):
            x = batch
            for weight, bias in zip(tensors[::2], tensors[1::2]):
                weight.grad = bias.grad = None
                x = x.relu() @ weight + bias
            loss: Any = (x - target).square().mean()
            loss.backward()
            start = time.perf_counter_ns()
            step()
            counted += time.perf_counter_ns() - start
        return counted

    return run


def by_torch(
    make: Make,
    params: Arrays,
    grads: Arrays,
    threads: int,
    *,
    arrange: Callable[[list[Tensor]], list[Any]] = list,
    way: Way = repeated,
    clipping: bool = False,
    compiled: bool = False,
) -> Run:
    """An optimizer of these arrays, as tensors that share their memory.

    Args:
        arrange: what the optimizer is given for these tensors.
        way: what surrounds a step.
        clipping: the gradients by their norm, before.
        compiled: by `torch.compile` with its defaults.
    """
    tensors: list[Tensor] = [torch.nn.Parameter(torch.from_numpy(p)) for p in params]
    for tensor, grad in zip(tensors, grads):
        tensor.grad = torch.from_numpy(grad)
    optimizer = make(arrange(tensors), lr=LR)

    def clip_and_step() -> None:
        if clipping:
            torch.nn.utils.clip_grad_norm_(tensors, MAX_NORM)
        optimizer.step()

    step: Step = clip_and_step if clipping else optimizer.step
    if compiled:
        # Isolated: one contender's compilations must not use up the limit of another.
        step = _torch.compile(clip_and_step, isolate_recompiles=True)
    run = way(step, optimizer, tensors)
    if compiled:
        torch.set_num_threads(threads)
        try:
            run(WARM_UP)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise LeftOut(f"torch.compile failed: {reason}") from error
    return run
