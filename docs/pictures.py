"""Draws the documentation's pictures.

    python docs/pictures.py [--to docs]

`dialects-*.svg`: the paths that dialects take on Rosenbrock's and Beale's functions, and how far from the minimum they
are after each update. `step-*.svg`: the four parts of a step. `precision-*.svg`: what becomes of an average by how it is
stored.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from rmsprop import RMSprop, dialect

# GitHub's colors: of text, of less important text, of lines; then of the dialects.
THEMES = {
    "light": ("#1f2328", "#59636e", "#d1d9e0"),
    "dark": ("#f0f6fc", "#9198a1", "#3d444d"),
}
LR, UPDATES = 5e-3, 600
# Gradients below 1, as in networks, so that eps and the start value of the average count.
SCALE = 0.01
# Momentum 0.9 makes a step ten times longer in the long run, hence a tenth of the learning rate.
DIALECTS = {
    "torch": ("#218bff", "-", LR, dialect("torch")),
    "keras": ("#2da44e", "-", LR, dialect("keras")),
    "tf1": ("#bc4c00", "-", LR, dialect("tf1")),
    "graves, lr / 10": ("#a475f9", "-", LR / 10, dialect("graves")),
}
Point = np.ndarray


def rosenbrock(w: Point) -> tuple[float, Point]:
    x, y = w
    value = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    return value, np.array([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)])


def beale(w: Point) -> tuple[float, Point]:
    x, y = w
    terms = [c - x + x * y**k for c, k in ((1.5, 1), (2.25, 2), (2.625, 3))]
    dx = sum(2 * t * (y**k - 1) for t, k in zip(terms, (1, 2, 3)))
    dy = sum(2 * t * k * x * y ** (k - 1) for t, k in zip(terms, (1, 2, 3)))
    return sum(t**2 for t in terms), np.array([dx, dy])


# A function, where to start, its minimum, and what is shown of the plane.
PROBLEMS = {
    "Rosenbrock": (rosenbrock, (-1.2, 1.0), (1.0, 1.0), (-2.0, 2.0, -0.8, 2.4)),
    "Beale": (beale, (1.0, 1.5), (3.0, 0.5), (0.0, 4.2, -1.2, 2.0)),
}


def path(
    function: Callable[[Point], tuple[float, Point]],
    start: Point,
    lr: float,
    options: dict,
) -> np.ndarray:
    """The points after each update."""
    w = np.array(start)
    opt = RMSprop([w], lr=lr, **options)
    points = [w.copy()]
    for _ in range(UPDATES):
        opt.step(grads=[SCALE * function(w)[1]])
        points.append(w.copy())
    return np.array(points)


def style(axes: Axes, theme: str) -> None:
    text, faint, line = THEMES[theme]
    axes.set_facecolor("none")
    axes.tick_params(which="both", colors=faint, labelsize=8)
    axes.title.set_color(text)
    axes.title.set_fontsize(10)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=faint, fontsize=9)
    for spine in axes.spines.values():
        spine.set_color(line)


def dialects(theme: str) -> Figure:
    text, _, line = THEMES[theme]
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    grid = figure.subplots(2, 2, height_ratios=(3, 2))
    for column, (name, problem) in enumerate(PROBLEMS.items()):
        function, start, minimum, (left, right, low, high) = problem
        upper, lower = grid[:, column]
        x, y = np.meshgrid(np.linspace(left, right, 200), np.linspace(low, high, 200))
        z = np.log10(1e-3 + function(np.array([x, y]))[0])
        upper.contour(x, y, z, levels=12, colors=line, linewidths=0.8)
        upper.plot(*minimum, "*", color=text, markersize=11, zorder=3)
        upper.plot(*start, "o", color=text, markersize=5, zorder=3)
        for label, (color, dash, lr, options) in DIALECTS.items():
            points = path(function, start, lr, options)
            upper.plot(*points.T, dash, color=color, lw=1.6, label=label)
            distance = np.linalg.norm(points - minimum, axis=1)
            lower.plot(distance, dash, color=color, lw=1.6)
        upper.set(title=name, xlim=(left, right), ylim=(low, high))
        lower.set(
            xlabel="update",
            ylabel="distance to the minimum",
            xlim=(0, UPDATES),
            ylim=(0, None),
        )
        lower.grid(color=line, lw=0.6)
        style(upper, theme)
        style(lower, theme)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=4, frameon=False
    )
    for entry in legend.get_texts():
        entry.set(color=text, fontsize=9)
    figure.suptitle(
        f"One problem, one learning rate ({LR:g}), four RMSprops",
        color=text,
        fontsize=11,
    )
    return figure


PARTS = (
    ("collect", "options of the groups,\ngradients, closures", "Python code may run"),
    (
        "check",
        "each array read where it lies,\np, g and state against each other",
        "errors are raised here",
    ),
    (
        "run",
        "pieces, one flat range, chunks:\nthe rule, in registers",
        "without the GIL if long",
    ),
    ("conclude", "updates are counted,\nautograd is told", ""),
)


def step(theme: str) -> Figure:
    text, faint, line = THEMES[theme]
    accent = DIALECTS["torch"][0]
    figure = Figure(figsize=(10, 2.5))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 10), ylim=(0, 2.5))
    axes.axis("off")
    width, gap = 2.15, 0.35
    place = {"ha": "center", "va": "center"}
    for index, (name, what, note) in enumerate(PARTS):
        x = 0.18 + index * (width + gap)
        box = FancyBboxPatch(
            (x, 0.85), width, 1.2, boxstyle="round,pad=0.02", fc="none", ec=line, lw=1.4
        )
        axes.add_patch(box)
        middle = x + width / 2
        axes.text(middle, 1.78, name, color=text, fontsize=12, weight="bold", **place)
        axes.text(
            middle, 1.25, what, color=text, fontsize=8.5, linespacing=1.5, **place
        )
        axes.text(
            middle, 0.62, note, color=faint, fontsize=8.5, style="italic", **place
        )
        if index:
            arrow = {"arrowstyle": "-|>", "color": faint, "lw": 1.4}
            axes.annotate(
                "", (x - 0.04, 1.45), (x - gap + 0.04, 1.45), arrowprops=arrow
            )
    start, end = 0.18 + width + gap, 0.18 + 3 * width + 2 * gap
    axes.plot([start, end], [0.36, 0.36], color=accent, lw=2)
    axes.text(
        (start + end) / 2,
        0.16,
        "no Python code runs between the last check and the last write",
        color=accent,
        fontsize=8.5,
        **place,
    )
    axes.text(
        start + width * 1.5 + gap,
        2.27,
        "nothing is written before here",
        color=faint,
        fontsize=8.5,
        **place,
    )
    return figure


STORAGE = {
    "float32": ("#59636e", "-", None),
    "bfloat16, at random": ("#218bff", "--", "bfloat16"),
    "8-bit codes": ("#2da44e", ":", "uint8"),
}
AVERAGED, OF = 6000, 16_384  # updates, elements


def nearest_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16 << 16).astype(np.uint32).view("f4")


def averages(alpha: float, gradients: Callable[[int], np.ndarray]) -> dict:
    """The mean of square_avg over what it averages, after each twentieth update."""
    opts = {
        name: RMSprop([np.zeros(OF, np.float32)], lr=0, alpha=alpha, state_dtype=dtype)
        for name, (_, _, dtype) in STORAGE.items()
    }
    v = np.zeros(OF, np.float32)
    found: dict[str, list[float]] = {name: [] for name in (*STORAGE, "to nearest")}
    for update in range(AVERAGED):
        g = gradients(update)
        for opt in opts.values():
            opt.step(grads=[g])
        v = nearest_bfloat16(np.float32(alpha) * v + np.float32(1 - alpha) * g * g)
        if update % 20 == 0:
            for name, opt in opts.items():
                state = RMSprop.float32_state(opt.state_dict())["state"][0]
                found[name].append(state["square_avg"].mean(dtype=float))
            found["to nearest"].append(v.mean(dtype=float))
    return found


def precision(theme: str) -> Figure:
    text, _, line = THEMES[theme]
    rng, constant = np.random.default_rng(0), np.full(OF, 0.3, np.float32)
    problems = {
        "A constant gradient": lambda _: constant,
        "Normal gradients": lambda _: rng.standard_normal(OF, np.float32) * 0.3,
    }
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (title, gradients) in zip(figure.subplots(1, 2), problems.items()):
        at = np.arange(0, AVERAGED, 20)
        for name, means in averages(0.999, gradients).items():
            color, dash, _ = STORAGE.get(name, (DIALECTS["tf1"][0], "-", None))
            label = "bfloat16, to nearest" if name == "to nearest" else name
            axes.plot(
                at, np.array(means) / 0.09, dash, color=color, lw=1.6, label=label
            )
        axes.set(title=title, xlabel="update", ylabel="average / what it averages")
        axes.set(xlim=(0, AVERAGED), ylim=(0, 1.7))
        axes.grid(color=line, lw=0.6)
        style(axes, theme)
    legend = axes.legend(frameon=False, loc="lower right")
    for entry in legend.get_texts():
        entry.set(color=text, fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().to
    folder.mkdir(parents=True, exist_ok=True)
    # Text that is text, and files that are the same each time.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rmsprop"})
    for draw in (dialects, step, precision):
        for theme in THEMES:
            target = folder / f"{draw.__name__}-{theme}.svg"
            draw(theme).savefig(target, transparent=True, metadata={"Date": None})
            print(target)


if __name__ == "__main__":
    main()
