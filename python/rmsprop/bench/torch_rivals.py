"""The front for torch and its rivals: torch's RMSprop, compiled or not, and the nearest
optimizers that torch has a fused CPU kernel of."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, islice
from typing import Any

import torch

import rmsprop.torch
from rmsprop.bench.array_rivals import limit
from rmsprop.bench.timing import (
    ALPHA,
    EPS,
    LR,
    Arrays,
    Contender,
    Factory,
    Kind,
    LeftOut,
    Run,
)

Make = Callable[..., torch.optim.Optimizer]  # parameters, lr

MAX_NORM = 1.0
BATCH = 64
WARM_UP = 12  # steps: torch compiles for eight values of lr, and gives up

# Typed as Any where torch's own types lag behind.
_torch: Any = torch
_torch._logging.set_logs(dynamo=logging.ERROR)  # no warning of that


def rivals(
    kind: Kind, tensors: int, compiled: bool, variants: bool
) -> dict[str, Factory]:
    """By name, ours first. A rival is a line more: add it here."""
    rival = partial(partial, by_torch, kind)
    ours = partial(rmsprop.torch.RMSprop, alpha=ALPHA, eps=EPS)
    stock = partial(torch.optim.RMSprop, alpha=ALPHA, eps=EPS)
    found: dict[str, Factory] = {"rmsprop": rival(ours)}
    if kind == "clip":
        clipping = partial(ours, max_grad_norm=MAX_NORM)
        found = {"rmsprop": partial(by_torch, "plain", clipping)}
    found["torch"] = rival(partial(stock, foreach=False))
    found["torch, foreach"] = rival(partial(stock, foreach=True))
    if compiled:
        found["compiled"] = rival(stock, compiled=True)
    if (
        variants and kind == "plain" and tensors > 1
    ):  # with one, memory is what a step costs
        found["rmsprop, moving lr"] = rival(ours, moving="float")
        if compiled:
            found["compiled, moving 0-d lr"] = rival(stock, compiled=True, moving="0-d")
        if compiled and tensors <= 10:  # which compiles eight times
            found["compiled, moving lr"] = rival(stock, compiled=True, moving="float")
    if kind != "clip":
        found["fused Adagrad*"] = rival(partial(torch.optim.Adagrad, fused=True))
        found["fused Adam*"] = rival(partial(torch.optim.Adam, fused=True))
        found["fused SGD*"] = rival(partial(torch.optim.SGD, fused=True))
    if kind != "backward":
        found["limit"] = partial(limit, clip=kind == "clip")
    return found


def by_torch(
    kind: Kind,
    make: Make,
    params: Arrays,
    grads: Arrays,
    threads: int,
    *,
    compiled: bool = False,
    moving: str = "",
) -> Contender | None:
    """An optimizer of these arrays, as tensors that share their memory.

    Args:
        compiled: by `torch.compile` with its defaults.
        moving: what lr is, "float" or "0-d", if it is another in every step.
    """
    tensors = [torch.nn.Parameter(torch.from_numpy(p)) for p in params]
    for tensor, grad in zip(tensors, grads):
        tensor.grad = torch.from_numpy(grad)
    optimizer = make(tensors, lr=torch.tensor(LR) if moving == "0-d" else LR)

    def whole_step() -> None:
        if kind == "clip":
            torch.nn.utils.clip_grad_norm_(tensors, MAX_NORM)
        optimizer.step()

    step = whole_step if kind == "clip" else optimizer.step
    if compiled:
        # Isolated: one contender's compilations must not use up the limit of another.
        step = _torch.compile(whole_step, isolate_recompiles=True)
    if kind == "backward":
        repeated = after_backward(step, tensors)
    elif moving:
        repeated = with_moving_lr(step, optimizer.param_groups[0])
    else:
        repeated = unchanged(step)

    def run(steps: int) -> int | None:
        torch.set_num_threads(threads)
        return repeated(steps)

    if compiled:
        try:
            run(WARM_UP)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise LeftOut(f"torch.compile failed: {reason}") from error
    return "", run


def unchanged(step: Callable[[], object]) -> Run:
    """The same gradients and hyperparameters every time."""

    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return run


def with_moving_lr(step: Callable[[], object], group: dict[str, Any]) -> Run:
    """As a schedule does: a new float, or a tensor that is filled with it."""
    schedule = (LR * (1 + 1e-12 * i) for i in count())

    def run_float(steps: int) -> None:
        for group["lr"] in islice(schedule, steps):
            step()

    def run_tensor(steps: int) -> None:
        for lr in islice(schedule, steps):
            group["lr"].fill_(lr)
            step()

    return run_tensor if isinstance(group["lr"], torch.Tensor) else run_float


def after_backward(step: Callable[[], object], tensors: Sequence[torch.Tensor]) -> Run:
    """Each step after a perceptron's real backward, and only the steps timed."""
    for tensor in tensors:
        torch.nn.init.normal_(tensor, std=0.1)
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
