"""What every program asks for, prints, and writes as JSON."""

import argparse
import datetime
import fnmatch
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from textwrap import wrap
from typing import Any

from rmsprop.__main__ import describe

from harness import is_installed

NAME_WIDTH, WIDTH = 34, 10  # of the first column and of the others
NAMES = {"python": "Python", "numpy": "NumPy"}


def parser(documentation: str, seconds: float) -> argparse.ArgumentParser:
    """One that knows `--seconds`, of which that many are the default, and `--json`."""
    made = argparse.ArgumentParser(description=documentation.splitlines()[0])
    about = "to go on sampling in each table or row"
    made.add_argument("--seconds", type=float, default=seconds, help=about)
    made.add_argument("--json", type=_file, metavar="FILE", help="the results, too")
    return made


def numbers(least: int) -> Callable[[str], list[int]]:
    """Reads a comma-separated list of numbers, for argparse."""

    def read(text: str) -> list[int]:
        found = [int(part) for part in text.split(",")]
        if min(found) < least:
            raise ValueError
        return found

    read.__name__ = f"list of numbers >= {least}"  # argparse's message shows it
    return read


def some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads a comma-separated list of names, or patterns such as `backward-*`."""

    def read(text: str) -> list[str]:
        found: list[str] = []
        for part in text.split(","):
            fitting = fnmatch.filter(names, part)
            if not fitting:
                wanted = f"expected some of {', '.join(names)}"
                raise argparse.ArgumentTypeError(f"{wanted}, got {part!r}")
            found += fitting
        return found

    return read


def _file(name: str) -> Path:
    """A file that could be written."""
    path = Path(name)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {path.parent}")
    return path


class Report:
    """Prints tables as they are measured, and keeps what the JSON is to have.

    Attributes:
        about: what the figures depend on.
        results: a mapping for each contender and place.
        left_out: what takes no part, and why.
    """

    def __init__(self, *packages: str) -> None:
        """Args: packages: whose versions matter too."""
        command = ["python", f"benches/{Path(sys.argv[0]).name}", *sys.argv[1:]]
        now = datetime.datetime.now(datetime.timezone.utc)
        date = now.isoformat(timespec="seconds")
        self.about = {"command": shlex.join(command), "date": date, **describe()}
        there = filter(is_installed, packages)
        self.about["versions"] |= {name: version(name) for name in there}
        self.results: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        print(headline(self.about), flush=True)

    def table(self, title: str, columns: Sequence[str]) -> None:
        """Begins one; long names take several lines."""
        print(f"\n{title}")
        names = [wrap(name, WIDTH) for name in columns]
        height = max(map(len, names))
        for line in zip(*([""] * (height - len(name)) + name for name in names)):
            self.row("", *line)

    def row(self, name: str, *cells: str | float) -> None:
        """A line of it; numbers get three digits."""
        texts = (cell if isinstance(cell, str) else digits(cell) for cell in cells)
        line = "".join(f"  {text:>{WIDTH}}" for text in texts)
        print(f"  {name:{NAME_WIDTH}}{line}".rstrip(), flush=True)

    def end(self, path: Path | None, **options: Any) -> None:
        """Prints what was left out, and writes the JSON if there is a file for it."""
        if self.left_out:
            print("\nleft out:")
            for what, why in self.left_out.items():
                print(f"  {what}: {why}")
        if path:
            found = {**self.about, **options}
            found |= {"left_out": self.left_out, "results": self.results}
            path.write_text(f"{json.dumps(found, indent=2)}\n")


def headline(about: dict[str, Any]) -> str:
    """What the figures depend on, on two lines, the second one about this package."""
    machine, versions = about["machine"], dict(about["versions"])
    ours = f"rmsprop {versions.pop('rmsprop')}, {about['isa']}, {about['date'][:10]}"
    first = [machine["processor"], f"{machine['cores']} cores"]
    first += [f"{NAMES.get(name, name)} {what}" for name, what in versions.items()]
    if machine["load"] is not None:
        first.append(f"load {machine['load']:.1f}")
    return f"{', '.join(first)}\n{ours}: {about['command']}"


def digits(value: float) -> str:
    """Three significant digits, no exponent."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"
