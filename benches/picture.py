"""Draws README's picture: what whole training loops gain.

    python benches/picture.py                 # measures them, some minutes
    python benches/picture.py build/loop.json # of `python benches/loop.py --json`

Writes docs/speed-light.svg and docs/speed-dark.svg, or other ones with `--to FOLDER`. Of
each loop two bars, what there is without rmsprop and with it: an update, and in it what the
optimizer and clipping take.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from harness.report import Report
from loop import measure_loops
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[1] / "docs"
TITLES = {
    "digits": "Perceptron in NumPy",
    "conv": "Small convolutional net",
    "impala": "IMPALA-like learner",
    "a2c": "Stable-Baselines3 A2C",
}
NAMES = {"NumPy by hand": "by hand", "torch": "torch.optim"}
# GitHub's colors: of text, of less important text, and of the two parts of a bar.
THEMES = {
    "light": ("#1f2328", "#59636e", "#bc4c00", "#d1d9e0"),
    "dark": ("#f0f6fc", "#9198a1", "#f0883e", "#3d444d"),
}
WIDTH, BAR, PAIR = 8.0, 0.24, 0.66  # inches; a pair with what is around it


def draw(about: dict[str, Any], rows: list[dict[str, Any]], theme: str) -> Figure:
    """One picture, of the loops that were measured."""
    text, faint, optimizer, rest = THEMES[theme]
    loops = {name: [r for r in rows if r["loop"] == name] for name in TITLES}
    loops = {name: found for name, found in loops.items() if found}
    height = 0.42 + PAIR * len(loops) + 0.34
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.39, 0, 0.48, 1), xlim=(0, 1), ylim=(height, 0))
    axes.axis("off")

    place: dict[str, Any] = {"va": "center", "fontsize": 10}
    for x, color, what in (
        (0.0, rest, "rest of the loop"),
        (0.4, optimizer, "optimizer and clipping"),
    ):
        axes.barh(0.2, 0.025, 0.14, left=x, color=color)
        axes.text(x + 0.04, 0.2, what, color=text, **place)
    for index, (name, found) in enumerate(loops.items()):
        stock, ours = found[0], next(r for r in found if r["contender"] == "rmsprop")
        top = 0.42 + PAIR * index + BAR / 2
        title = {"color": text, "ha": "right", "weight": "bold", **place}
        axes.text(-0.26, top + BAR / 2, TITLES[name], **title)
        for y, row in ((top, stock), (top + BAR, ours)):
            us = row["step_us"] + row["clip_us"]
            parts = us, row["update_us"] - us
            used, others = (part / stock["update_us"] for part in parts)
            axes.barh(y, others, BAR * 0.86, color=rest)
            axes.barh(y, used, BAR * 0.86, left=others, color=optimizer)
            label = NAMES.get(row["contender"], row["contender"])
            color = text if row is ours else faint
            axes.text(-0.02, y, label, color=color, ha="right", **place)
        gain = f"{ours['speedup']:.2f}× as fast"
        end = ours["update_us"] / stock["update_us"] + 0.015
        axes.text(end, top + BAR, gain, color=text, weight="bold", **place)
    versions = about["versions"]
    processor = about["machine"]["processor"].replace(" Processor", "")
    notes = ["time of an update, one thread", processor]
    notes += [f"{what} {versions[what.lower()]}" for what in ("torch", "NumPy")]
    notes.append(about["date"][:10])
    small = {**place, "fontsize": 8, "color": faint, "ha": "center"}
    axes.text(0.27, height - 0.14, ", ".join(notes), **small)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("json", type=Path, nargs="?", help="of benches/loop.py; or else measures")
    add("--seconds", type=float, default=20.0, help="to go on sampling in each loop")
    add("--to", type=Path, default=DOCS, metavar="FOLDER")
    args = parser.parse_args()
    if args.json:
        about = json.loads(args.json.read_text())
        results = about["results"]
    else:
        report = Report()
        measure_loops(report, list(TITLES), args.seconds)
        report.end(None)
        about, results = report.about, report.results
    # Two runs with the same numbers write the same bytes.
    mpl.rcParams["svg.hashsalt"] = "speed"
    for theme in THEMES:
        path = args.to / f"speed-{theme}.svg"
        figure = draw(about, results, theme)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main()
