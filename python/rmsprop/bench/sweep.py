"""Contenders over a range of sizes: arguments, a table, JSON, and lines in a plot."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

from rmsprop.bench.cases import Shapes, make_case
from rmsprop.bench.command import check_files, choose_fronts
from rmsprop.bench.report import context, footer
from rmsprop.bench.timing import Factory, LeftOut, Run

Contenders = Mapping[str, tuple[Factory, int]]  # by name, with the threads of each
LINES = ("-", "--", ":", "-.")  # of the contenders that share a color


class Point(NamedTuple):
    """What one contender took at one size, called in one way."""

    front: str
    way: str
    size: int
    contender: str
    median_us: float
    mean_us: float
    p90_us: float
    samples: int


class Sweep:
    """What is asked for and what was found, printed as it comes in.

    Attributes:
        about: what it depends on.
        fronts: those to measure.
        points: what was measured.
        left_out: what takes no part, and why.
    """

    def __init__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, command: str
    ) -> None:
        self.points: list[Point] = []
        self.left_out: dict[str, str] = {}
        self.fronts = choose_fronts(parser, args.front, self.left_out)
        check_files(parser, args)
        self.about = context(command)
        self._json: str | None = args.json
        self._width = 0

    def runs(
        self, front: str, shapes: Shapes, contenders: Contenders
    ) -> dict[str, Run]:
        """Those that take part, each with parameters of its own."""
        params, grads = make_case(front, shapes)
        found = {}
        for name, (factory, threads) in contenders.items():
            try:
                made = factory(params(), grads, threads)
            except LeftOut as reason:
                size = f"{len(shapes):,} x {shapes[0][0]:,}"
                self.left_out[f"{name} in {size}"] = str(reason)
                continue
            if made:
                found[name] = made[1]
        return found

    def add(
        self, front: str, way: str, size: int, times: Mapping[str, list[float]]
    ) -> dict[str, Point]:
        """Keeps what these samples, by name, come to."""
        found = {}
        for name, us in times.items():
            median, mean = statistics.median(us), statistics.fmean(us)
            p90 = statistics.quantiles(us, n=10, method="inclusive")[-1]
            found[name] = Point(front, way, size, name, median, mean, p90, len(us))
        self.points += found.values()
        return found

    def head(self, title: str, columns: Iterable[str], width: int) -> None:
        """Begins a table; long names take several lines."""
        self._width = width
        names = [wrap(name, width) for name in columns]
        height = max(map(len, names))
        self._say("", title)
        for line in zip(*([""] * (height - len(name)) + name for name in names)):
            self.row(line)

    def row(self, cells: Iterable[str]) -> None:
        self._say("".join(f"{cell:>{self._width + 2}}" for cell in cells))

    def end(self) -> None:
        """Prints what was left out, and writes the JSON."""
        if self.left_out:
            self._say("", "left out:")
            self._say(*(f"  {what}: {why}" for what, why in self.left_out.items()))
        results = [point._asdict() for point in self.points]
        document = {**self.about, "left_out": self.left_out, "results": results}
        text = json.dumps(document, indent=2)
        if self._json == "-":
            print(text)
        elif self._json:
            Path(self._json).write_text(f"{text}\n")

    def _say(self, *lines: str) -> None:
        out = sys.stderr if self._json == "-" else sys.stdout
        print(*lines, sep="\n", file=out, flush=True)


def numbers(least: int) -> Callable[[str], list[int]]:
    """Reads a comma-separated list of numbers, for argparse."""

    def read(text: str) -> list[int]:
        found = [int(part) for part in text.split(",")]
        if min(found) < least:
            raise ValueError
        return found

    read.__name__ = f"list of numbers >= {least}"  # argparse's message shows it
    return read


def add_arguments(
    parser: argparse.ArgumentParser, sizes: Sequence[int], unit: str
) -> None:
    """Adds what can be asked of any sweep."""
    add = parser.add_argument
    about = f"{unit}; {sizes[0]:,} to {sizes[-1]:,}, if left out"
    add("--sizes", type=numbers(1), metavar="N,M", default=sizes, help=about)
    add("--front", metavar="A,B", help="arrays, torch; both, if left out")
    add("--seconds", type=float, default=1.0, help="to go on sampling at each size")
    add("--json", metavar="FILE", help="write the results there; - for stdout")
    add("--plot", type=Path, metavar="FILE", help="draw them: .png, .svg or .pdf")


def draw(
    axes: Any,
    points: Iterable[Point],
    scale: Callable[[Point], float],
    *,
    p90: bool = False,
) -> None:
    """Draws a line through each contender's medians, ours bold.

    A color stands for what names have in common before the first comma.

    Args:
        scale: seconds in the picture for a microsecond of the point.
        p90: whiskers up to the 90th percentile where that is above, the lines a little apart.
    """
    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(point.contender, []).append(point)
    families: dict[str, list[str]] = {"rmsprop": []}
    for index, (name, line) in enumerate(lines.items()):
        family, ours = name.partition(",")[0], is_ours(name)
        kin = families.setdefault(family, [])
        above = [
            max(0.0, point.p90_us - point.median_us) * scale(point) for point in line
        ]
        axes.errorbar(
            [point.size * (1.05**index if p90 else 1) for point in line],
            [point.median_us * scale(point) for point in line],
            yerr=[[0] * len(line), above] if p90 else None,
            elinewidth=0.8,
            capsize=2,
            color="black" if ours else f"C{list(families).index(family) - 1}",
            linestyle=LINES[len(kin) % len(LINES)],
            lw=2.2 if ours else 1.1,
            marker="o",
            ms=3 if ours else 2,
            zorder=3 if ours else 2,
            label=name,
        )
        kin.append(name)
    ticker = import_module("matplotlib.ticker")
    axes.set(xscale="log", yscale="log")
    sizes = {point.size for line in lines.values() for point in line}
    if len(sizes) < 6:
        axes.set_xticks(sorted(sizes))
    for axis, unit in ((axes.xaxis, ""), (axes.yaxis, "s")):
        axis.set_major_formatter(ticker.EngFormatter(unit))
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def is_ours(name: str) -> bool:
    return name.startswith("rmsprop")


def legend(axes: Any) -> None:
    """Names the lines beside the axes."""
    found = axes.legend(
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
        fontsize=7,
        handlelength=3,
    )
    for text in found.get_texts():
        text.set_fontweight("bold" if is_ours(text.get_text()) else "normal")


def save(figure: Any, about: dict[str, Any], note: str, path: Path) -> None:
    """Saves a figure with that note below it, and what it depends on."""
    width = min(100, int(17 * figure.get_figwidth()))  # characters
    figure.supxlabel(f"{note}\n\n{footer(about, width)}", fontsize=7)
    figure.savefig(path, dpi=150)
