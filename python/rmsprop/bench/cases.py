"""The cases, that all contenders do the same in them, and one section of the results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from rmsprop.bench import array_rivals
from rmsprop.bench.timing import Arrays, Contender, Factory, Kind, LeftOut, measure
from rmsprop.machine import is_installed

Shapes = list[tuple[int, ...]]


class Case(NamedTuple):
    title: str
    shapes: Shapes
    kind: Kind = "plain"  # arrays have no others
    compiled: bool = True  # in a full run, unless --compile says otherwise


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
# Times that all memory is made anew in a section: with 1 M elements, what fits the last
# cache depends on the pages that one gets, for a fifth of the time (Zen 5, 2026-11).
PLACEMENTS = 3
QUICK = ("mlp64", "mlp256", "many", "1m", "10m")


@dataclass
class Plan:
    """How to measure.

    Attributes:
        sample_s: seconds a sample should last.
        budget_s: seconds to go on sampling in a section; five rounds at least.
        compiled: cases in which torch.compile takes part.
        variants: whether lr that moves takes part too.
        left_out: what takes no part, and why; filled while measuring.
    """

    sample_s: float
    budget_s: float
    compiled: frozenset[str] = frozenset()
    variants: bool = False
    left_out: dict[str, str] = field(default_factory=dict)


class Row(NamedTuple):
    """What one contender took in one section; the ratios are its times over ours."""

    rival: str
    form: str  # "" or the form that it takes in this case
    median_us: float
    min_us: float
    median_ratio: float
    min_ratio: float
    samples: int

    @property
    def title(self) -> str:
        return f"{self.rival} ({self.form})" if self.form else self.rival


class Section(NamedTuple):
    """One case on one front with one number of threads; ours is the first row."""

    front: str
    case: str
    threads: int
    rows: list[Row]


def fronts(left_out: dict[str, str]) -> list[str]:
    """The fronts that can be measured; adds to `left_out` what is not installed."""
    if not is_installed("numba"):
        left_out["numba"] = "not installed (pip install numba)"
    if not is_installed("torch"):
        left_out["torch"] = "not installed (pip install torch)"
        return ["arrays"]
    return ["arrays", "torch"]


def make_case(front: str, shapes: Shapes) -> tuple[Callable[[], Arrays], Arrays]:
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


def rivals(front: str, name: str, plan: Plan) -> dict[str, Factory]:
    """The contenders of one front that fit the case, ours first."""
    case = CASES[name]
    if front == "arrays":
        return array_rivals.RIVALS if case.kind == "plain" else {}
    from rmsprop.bench import torch_rivals

    tensors, compiled = len(case.shapes), name in plan.compiled
    return torch_rivals.rivals(case.kind, tensors, compiled, plan.variants)


def contenders(
    front: str, name: str, threads: int, plan: Plan
) -> Iterator[tuple[str, Contender, Arrays]]:
    """Those that take part, by name, with their parameters."""
    case = CASES[name]
    params, grads = make_case(front, case.shapes)
    for rival, factory in rivals(front, name, plan).items():
        # Torch's clipping writes the gradients: each contender has its own then.
        own = make_case(front, case.shapes)[1] if case.kind == "clip" else grads
        arrays = params()
        try:
            made = factory(arrays, own, threads)
        except LeftOut as reason:
            plan.left_out[f"{rival} in {name}"] = str(reason)
            continue
        if made:
            yield rival, made, arrays


def check(front: str, name: str, threads: list[int], plan: Plan) -> None:
    """All of them compute the same update, or comparing their times means nothing.

    Raises:
        AssertionError: naming the first that does not.
    """
    expected = Arrays()
    for count in threads:
        for rival, (_, run), arrays in contenders(front, name, count, plan):
            if rival == "limit" or rival.endswith("*"):
                continue
            # Trials may have made steps: start again from the state that they left.
            run(2000)
            for array in arrays:
                array[...] = 1
            run(3)
            expected = expected or [array.copy() for array in arrays]
            for array, wanted in zip(arrays, expected):
                np.testing.assert_allclose(array, wanted, rtol=1e-5, err_msg=rival)


def bench(front: str, name: str, threads: int, plan: Plan) -> Section:
    """Measures one section; without rows if the case does not exist on that front."""
    times: dict[str, list[float]] = {}
    forms: dict[str, set[str]] = {}
    for _ in range(PLACEMENTS):
        found = list(contenders(front, name, threads, plan))
        runs = [run for _, (_, run), _ in found]
        if not runs:
            break
        measured = measure(runs, plan.sample_s, plan.budget_s / PLACEMENTS)
        for (rival, (form, _), _), samples in zip(found, measured):
            times.setdefault(rival, []).extend(samples)
            forms.setdefault(rival, set()).add(form)
    section = Section(front, name, threads, [])
    for rival, samples in times.items():
        form = " or ".join(sorted(forms[rival]))
        median, least = statistics.median(samples), min(samples)
        ours = section.rows[0] if section.rows else None
        over = (median / ours.median_us, least / ours.min_us) if ours else (1.0, 1.0)
        section.rows.append(Row(rival, form, median, least, *over, len(samples)))
    return section
