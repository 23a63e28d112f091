"""Results as a table in the terminal, as JSON, and as a plot; progress meanwhile."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from textwrap import fill
from typing import Any, TextIO

from rmsprop import info, machine
from rmsprop.bench.cases import CASES, Section

SUFFIXES = (".pdf", ".png", ".svg")
HEADER = ("rival", "median", "min", "/ ours", "/ ours", "n")
LEGEND = (
    "us a step, median and minimum of n rounds; both divided by ours, as many threads"
)
Say = Callable[[str], None]  # what is being measured now
Show = Callable[[Section], None]  # it is done: prints it, if it has rows


def context(command: str) -> dict[str, Any]:
    """What the figures depend on: the head of the JSON."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "command": command,
        "date": now.isoformat(timespec="seconds"),
        "rmsprop": info(),
        "machine": machine.describe(),
        "versions": machine.versions("numpy", "numba", "torch"),
    }


def headline(about: dict[str, Any]) -> str:
    """The same on two lines, the second one about this package."""
    found, ours = about["machine"], about["rmsprop"]
    names = {"python": "Python", "numpy": "NumPy"}
    versions = (
        f"{names.get(name, name)} {number}"
        for name, number in about["versions"].items()
        if name != "rmsprop"
    )
    cores = f"{found['cores']} cores"
    first = [found["processor"], cores, *versions]
    if found["load"] is not None:
        first.append(f"load {found['load']:.1f}")
    second = f"rmsprop {ours['version']}, {ours['isa']}, {about['date'][:10]}"
    return f"{', '.join(first)}\n{second}: {about['command']}"


def footer(about: dict[str, Any], width: int = 100) -> str:
    """The same below a plot: a command may be longer than the picture is wide."""
    return "\n".join(fill(line, width) for line in headline(about).splitlines())


def document(
    about: dict[str, Any], sections: list[Section], left_out: dict[str, str]
) -> dict[str, Any]:
    """All that was measured, for `json.dump`; times in us, ratios to ours."""
    results = [
        {
            "front": section.front,
            "case": section.case,
            "title": CASES[section.case].title,
            "threads": section.threads,
            **row._asdict(),
        }
        for section in sections
        for row in section.rows
    ]
    return {**about, "left_out": left_out, "results": results}


@contextmanager
def terminal(total: int, out: TextIO) -> Iterator[tuple[Say, Show]]:
    """Progress over `total` sections, and how to show one that is done.

    With rich if it is installed and `out` is a terminal, otherwise in plain text, with the
    bar on stderr if that is a terminal.
    """
    if machine.is_installed("rich") and out.isatty():
        with _rich_terminal(total, out) as both:
            yield both
    else:
        with _plain_terminal(total, out) as both:
            yield both


@contextmanager
def _plain_terminal(total: int, out: TextIO) -> Iterator[tuple[Say, Show]]:
    line = "  {:32}{:>10}{:>10}{:>8}{:>8}{:>6}".format
    bar = sys.stderr if sys.stderr.isatty() else None
    done = 0

    def erase() -> None:
        if bar:
            print("\r\x1b[K", end="", file=bar, flush=True)

    def say(what: str) -> None:
        erase()
        if bar:
            filled = "#" * (24 * done // total)
            text = f"[{filled:24}] {done}/{total} {what}"
            print(text, end="", file=bar, flush=True)

    def show(section: Section) -> None:
        nonlocal done
        done += 1
        if not section.rows:
            return
        erase()
        print(f"\n{title(section)}", line(*HEADER), sep="\n", file=out)
        for cells in _cells(section):
            print(line(*cells), file=out)
        out.flush()

    try:
        yield say, show
    finally:
        erase()


@contextmanager
def _rich_terminal(total: int, out: TextIO) -> Iterator[tuple[Say, Show]]:
    parts, tables = import_module("rich.progress"), import_module("rich.table")
    console = import_module("rich.console").Console(file=out, highlight=False)
    progress = parts.Progress(
        parts.BarColumn(),
        parts.MofNCompleteColumn(),
        parts.TextColumn("{task.description}"),
        console=console,
        transient=True,
        auto_refresh=False,  # which a thread would do, while we measure
    )
    task = progress.add_task("", total=total)

    def say(what: str) -> None:
        progress.update(task, description=what, refresh=True)

    def show(section: Section) -> None:
        progress.advance(task)
        if not section.rows:
            return
        table = tables.Table(title=title(section), title_justify="left")
        for index, name in enumerate(HEADER):
            table.add_column(name, justify="right" if index else "left")
        for cells in _cells(section):
            ours = cells[0] == "rmsprop"
            table.add_row(*cells, style="bold" if ours else None)
        console.print(table)

    with progress:
        yield say, show


def title(section: Section) -> str:
    """One line about what it measures."""
    case = f"{section.case}: {CASES[section.case].title}"
    return f"{case}, {section.front}, {_threads(section.threads)}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _cells(section: Section) -> Iterator[tuple[str, ...]]:
    for row in section.rows:
        times = (row.median_us, row.min_us, row.median_ratio, row.min_ratio)
        yield row.title, *map(digits, times), str(row.samples)


def digits(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def check_plot(path: Path) -> None:
    """Before anything is measured: whether it could be drawn.

    Raises:
        ValueError: the name says no format that is drawn, or no folder that is there.
        ImportError: matplotlib is missing.
    """
    if path.suffix not in SUFFIXES:
        wanted = f"expected a name that ends in one of {', '.join(SUFFIXES)}"
        raise ValueError(f"--plot: {wanted}, got {str(path)!r}")
    check_folder("--plot", path)
    if not machine.is_installed("matplotlib"):
        raise ImportError(
            "--plot: expected matplotlib, got none: pip install matplotlib"
        )


def check_folder(option: str, path: Path) -> None:
    """Raises ValueError if there is no folder to write that file into."""
    if not path.parent.is_dir():
        raise ValueError(f"{option}: expected a folder that exists, got {path.parent}")


def plot(about: dict[str, Any], sections: list[Section], path: Path) -> None:
    """Saves one panel for each front and number of threads, a bar for each rival."""
    panels: dict[tuple[str, int], list[Section]] = {}
    for section in sections:
        panels.setdefault((section.front, section.threads), []).append(section)
    rivals = {row.rival: None for s in sections for row in s.rows[1:]}
    colors = {name: f"C{index}" for index, name in enumerate(rivals)}
    colors["limit"] = "0.6"

    # A panel is as high as it has bars, each case has a line of its own, for its name.
    bars = [sum(len(s.rows) for s in found) + 1 for found in panels.values()]
    figure = import_module("matplotlib.figure").Figure(
        figsize=(8, 0.19 * sum(bars) + 0.65 * len(bars) + 0.6), layout="constrained"
    )
    column = figure.subplots(
        len(panels), squeeze=False, sharex=True, height_ratios=bars
    )
    for axes, ((front, threads), found) in zip(column[:, 0], panels.items()):
        y, names, heads = 0.0, dict[float, str](), list[int]()
        for section in found:
            ours, *others = section.rows
            heads.append(len(names))
            names[y] = f"{CASES[section.case].title}: {digits(ours.median_us)} us"
            for row in others:
                y += 1
                names[y] = row.title
                width, color = row.median_ratio - 1, colors[row.rival]
                axes.barh(y, width, 0.8, left=1, color=color)
                axes.annotate(
                    f"{digits(row.median_ratio)}x",
                    (max(row.median_ratio, 1), y),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
            y += 1.5
        axes.axvline(1, color="black", lw=0.8)
        axes.set_xscale("log")
        axes.margins(x=0.08)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(y - 0.5, -0.8)
        axes.set_yticks(list(names), list(names.values()), fontsize=7)
        for head in heads:
            axes.get_yticklabels()[head].set_fontweight("bold")
        axes.tick_params(axis="x", labelsize=7)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_title(f"{front}, {_threads(threads)}", fontsize=9, loc="left")
    column[-1, 0].set_xlabel(
        "median time of a step over that of rmsprop, which is in bold; "
        f"* another rule\n\n{footer(about)}",
        fontsize=7,
    )
    figure.savefig(path, dpi=150)
