"""The cases, who takes part in them, and that all contenders do the same."""

import functools
from collections.abc import Callable, Iterator
from itertools import pairwise
from time import perf_counter_ns
from typing import NamedTuple

import numpy as np

from harness import array_rivals, is_installed
from harness.timing import Arrays, Contender, Factory, LeftOut, Run

Shapes = list[tuple[int, ...]]
FRONTS = ("arrays", "torch")
FLUSHED_MIB = 128  # more than most last-level caches


class Case(NamedTuple):
    """What is stepped, and how.

    Attributes:
        kind: "plain": the same gradients every time; "cold": the same, each after the
            caches were filled with something else; "backward": each right after a real
            backward; "clip": the gradients' norm clipped first; "schedule": another lr
            every time; "groups": in one group and in one each; "odd": with and without
            two tensors that are not for the core; "float64": gradients in that type.
        compiled: whether torch.compile takes part.
    """

    title: str
    shapes: Shapes
    kind: str = "plain"
    compiled: bool = True


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
    "mlp64-schedule": Case("4.6 k, another lr every time", MLP64, "schedule"),
    "mlp64-clip": Case("4.6 k, clipped", MLP64, "clip"),
    "mlp64-cold": Case("4.6 k, out of cold caches", MLP64, "cold"),
    "mlp256": Case("6 tensors, 269 k", MLP256),
    "mlp256-clip": Case("269 k, clipped", MLP256, "clip"),
    "mlp256-cold": Case("269 k, out of cold caches", MLP256, "cold"),
    "backward-5k": Case("4.6 k, after a backward", MLP64, "backward"),
    **{
        f"backward-{name}": Case(
            f"4 layers, {elements}, after a backward", mlp(*[width] * 5), "backward"
        )
        for name, elements, width in (
            ("70k", "0.07 M", 132),
            ("260k", "0.26 M", 256),
            ("1m", "1.05 M", 512),
            ("4m", "4.2 M", 1024),
            ("10m", "10.2 M", 1600),
        )
    },
    "small161": Case("161 tensors x 100", [(100,)] * 161),
    "resnet50": Case("ResNet-50, 25.6 M", resnet50(), compiled=False),
    "many": Case("1,000 tensors x 100", [(100,)] * 1000, compiled=False),
    "groups": Case("100 tensors x 100, in groups", [(100,)] * 100, "groups"),
    "odd": Case("500 tensors x 100, two odd ones more", [(100,)] * 500, "odd"),
    "1m": Case("1 M", [(1_000_000,)]),
    "1m-cold": Case("1 M, out of cold caches", [(1_000_000,)], "cold"),
    "1m-float64": Case("1 M, gradients in float64", [(1_000_000,)], "float64"),
    "10m": Case("10 M", [(10_000_000,)]),
    "10m-clip": Case("10 M, clipped", [(10_000_000,)], "clip"),
    "50m": Case("50 M", [(50_000_000,)], compiled=False),
}


def fronts(left_out: dict[str, str]) -> list[str]:
    """Those that can be measured; adds to `left_out` what is not installed."""
    for package in ("numba", "torch"):
        if not is_installed(package):
            left_out[package] = "not installed"
    return [front for front in FRONTS if front not in left_out]


def rivals(front: str, case: Case, compiled: bool = False) -> dict[str, Factory]:
    """Who takes part, ours first; nobody if the front has no such case."""
    if front == "arrays":
        found = array_rivals.rivals(case.kind)
    else:
        from harness import torch_rivals

        found = torch_rivals.rivals(case.kind, compiled and case.compiled)
    if case.kind == "cold":
        return {name: _cold(factory) for name, factory in found.items()}
    return found


def make_arrays(front: str, shapes: Shapes) -> tuple[Callable[[], Arrays], Arrays]:
    """A function that makes equal parameters each time, and the gradients."""

    def ones(shape: tuple[int, ...]) -> np.ndarray:
        if front == "arrays":
            return np.ones(shape, np.float32)
        import torch

        # In memory that is aligned as torch does it.
        array: np.ndarray = torch.ones(shape).numpy()
        return array

    rng = np.random.default_rng(0)
    grads = [ones(shape) for shape in shapes]
    for grad in grads:
        rng.standard_normal(out=grad, dtype=np.float32)
    return lambda: [ones(shape) for shape in shapes], grads


def contenders(
    front: str,
    shapes: Shapes,
    factories: dict[str, tuple[Factory, int]],
    *,
    left_out: dict[str, str] | None = None,
    own_grads: bool = False,
) -> Iterator[tuple[str, Contender, Arrays]]:
    """Those that take part, by name, each with parameters of its own.

    Args:
        factories: with the number of threads for each.
        left_out: gets the names of those that take no part, and why.
        own_grads: for those that write them.
    """
    params, grads = make_arrays(front, shapes)
    for name, (factory, threads) in factories.items():
        arrays = params()
        own = make_arrays(front, shapes)[1] if own_grads else grads
        try:
            run = factory(arrays, own, threads)
        except LeftOut as reason:
            if left_out is not None:
                left_out[name] = str(reason)
            continue
        if run:
            yield name, Contender(run, threads), arrays


def check(front: str, threads: list[int], compiled: bool) -> None:
    """All of them compute the same update, or comparing their times means nothing.

    Raises:
        AssertionError: naming the first that does not.
    """
    case, expected = CASES["mlp64"], Arrays()
    for count in threads:
        factories = {
            name: (factory, count)
            for name, factory in rivals(front, case, compiled).items()
            if name != "limit" and not name.endswith("*")
        }
        found = contenders(front, case.shapes, factories)
        for name, contender, arrays in found:
            # Trials may have made steps: start again from the state that they left.
            contender.run(2000)
            for array in arrays:
                array[...] = 1
            contender.run(3)
            expected = expected or [array.copy() for array in arrays]
            for array, wanted in zip(arrays, expected):
                np.testing.assert_allclose(array, wanted, rtol=1e-5, err_msg=name)


@functools.cache
def _other_memory() -> np.ndarray:
    return np.ones(FLUSHED_MIB << 18, np.float32)


def _cold(factory: Factory) -> Factory:
    """Each step after a walk over other memory, which is not counted.

    Another thread's second-level cache keeps what it has.
    """

    def cold(params: Arrays, grads: Arrays, threads: int) -> Run | None:
        run = factory(params, grads, threads)
        if not run:
            return None
        other = _other_memory()

        def run_cold(steps: int) -> int:
            counted = 0
            for _ in range(steps):
                other.max()
                start = perf_counter_ns()
                run(1)
                counted += perf_counter_ns() - start
            return counted

        return run_cold

    return cold
