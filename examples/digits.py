"""Trains a NumPy perceptron on scikit-learn's handwritten digits with rmsprop.

    python examples/digits.py [--plot build/digits.png]

Prints the test accuracy, what the optimizer costs beside the same update written by
hand in NumPy, and what other dialects reach; draws them. Runs under a minute.
Needs scikit-learn, matplotlib and tqdm.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import numpy as np
from matplotlib.figure import Figure
from rmsprop import Parameter, RMSprop, dialect
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

EPOCHS, BATCH, LR = 40, 32, 5e-4
# Momentum 0.9 makes a step up to ten times longer, hence the smaller learning rates.
DIALECTS = {
    "oneflow": (LR, dialect("oneflow")),
    "torch": (LR, dialect("torch")),
    "tf1, momentum 0.9": (1e-4, dialect("tf1", momentum=0.9)),
    "graves": (1e-4, dialect("graves")),
}


def load() -> list[np.ndarray]:
    """Images to train and to test with, then the labels of both."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    parts = train_test_split(images, labels, test_size=1 / 3, random_state=0)
    return [np.asarray(part) for part in parts]


class Perceptron:
    """`x @ w + b` with ReLU in between; `backward` sets the parameters' `.grad`."""

    def __init__(self, seed: int, sizes: tuple[int, ...] = (64, 128, 64, 10)) -> None:
        rng, self.layers = np.random.default_rng(seed), []
        for k, (n, m) in enumerate(pairwise(sizes)):
            w = rng.normal(0, (2 / n) ** 0.5, (n, m)).astype(np.float32)
            b = np.zeros(m, dtype=np.float32)
            self.layers.append((Parameter(w, f"{k}.weight"), Parameter(b, f"{k}.bias")))

    def parameters(self) -> Iterator[Parameter]:
        return (parameter for layer in self.layers for parameter in layer)

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.inputs: list[np.ndarray] = []  # of each layer, for the way back
        for w, b in self.layers:
            x = np.maximum(x, 0) if self.inputs else x
            self.inputs.append(x)
            x = x @ w.data + b.data
        return x

    def backward(self, d: np.ndarray) -> None:
        for k in reversed(range(len(self.layers))):
            (w, b), x = self.layers[k], self.inputs[k]
            w.grad, b.grad = x.T @ d, d.sum(axis=0)
            if k:  # the images need no gradient
                d = (d @ w.data.T) * (x > 0)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean loss and its gradient with respect to the logits."""
    rows = np.arange(len(labels))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.log(p[rows, labels] + 1e-12).mean()
    p[rows, labels] -= 1
    return float(loss), p / len(labels)


class ByHand:
    """The update one writes without a library: the oneflow dialect in NumPy."""

    def __init__(self, parameters: Iterator[Parameter], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr
        self.square_avg = [np.zeros_like(p.data) for p in self.parameters]

    def step(self) -> None:
        for parameter, v in zip(self.parameters, self.square_avg):
            p, g = parameter.data, parameter.grad
            v *= 0.99
            v += 0.01 * g * g
            p -= self.lr * g / np.sqrt(v + 1e-8)


@dataclass
class Run:
    """What a training leaves behind: curves by epoch, and where the time went."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    seconds_in_step: float = 0.0


def train(
    net: Perceptron, opt: RMSprop | ByHand, data: list[np.ndarray], seed: int, bar: str
) -> Run:
    """Trains in mini-batches whose order depends on the seed only."""
    x_train, x_test, y_train, y_test = data
    cuts = range(BATCH, len(x_train), BATCH)
    rng, run = np.random.default_rng(seed), Run()
    progress = tqdm(range(EPOCHS), desc=f"{bar:18}", unit="epoch", disable=not bar)
    for _ in progress:
        losses, start = [], perf_counter()
        for batch in np.split(rng.permutation(len(x_train)), cuts):
            loss, d = cross_entropy(net.forward(x_train[batch]), y_train[batch])
            net.backward(d)
            before = perf_counter()
            opt.step()
            run.seconds_in_step += perf_counter() - before
            losses.append(loss)
        run.seconds += perf_counter() - start
        run.steps += len(losses)
        run.loss.append(sum(losses) / len(losses))
        hits = net.forward(x_test).argmax(axis=1) == y_test
        run.accuracy.append(float(hits.mean()))
        progress.set_postfix_str(
            f"loss {run.loss[-1]:.4f}, accuracy {hits.mean():.4f}", refresh=False
        )
    return run


def compare(data: list[np.ndarray], rounds: int = 5) -> None:
    """Trains with rmsprop and by hand in turns; prints the fastest run of each."""
    runs: dict[str, list[Run]] = {"rmsprop": [], "by hand": []}
    for k in range(rounds):
        for name, kind in zip(runs, (RMSprop, ByHand)):
            net = Perceptron(seed=0)
            opt = kind(net.parameters(), lr=LR)
            runs[name].append(train(net, opt, data, seed=0, bar=name if k == 0 else ""))
    for name, repeated in runs.items():
        run = min(repeated, key=lambda run: run.seconds)
        print(
            f"{name}: test accuracy {run.accuracy[-1]:.4f}, "
            f"{run.seconds_in_step / run.seconds:.1%} of the loop in step(), "
            f"{run.seconds_in_step / run.steps * 1e6:.1f} us each, "
            f"{run.steps / run.seconds:,.0f} steps/s"
        )


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    """Saves loss and accuracy by epoch: the seeds' mean as a line, their range shaded."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = np.arange(1, EPOCHS + 1)
    for (name, seeds), style in zip(runs.items(), ("-", "--", "-", "-")):
        for axes, curves in (
            (left, np.array([run.loss for run in seeds])),
            (right, np.array([run.accuracy for run in seeds]) * 100),
        ):
            label = f"{name}, lr {DIALECTS[name][0]:g}"
            (line,) = axes.plot(epochs, curves.mean(axis=0), style, label=label)
            band = {"color": line.get_color(), "alpha": 0.15, "lw": 0}
            axes.fill_between(epochs, curves.min(axis=0), curves.max(axis=0), **band)
            axes.grid(alpha=0.3)
            axes.set(xlabel="epoch", xlim=(1, EPOCHS))
    left.set(title="Training loss (cross-entropy)", ylabel="nats", yscale="log")
    right.set(title="Test accuracy", ylabel="%", ylim=(90, 99))
    right.legend(loc="lower right")
    title = f"RMSprop dialects on 8 x 8 digits, mean and range of {min(map(len, runs.values()))} seeds"
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Trains a NumPy perceptron on scikit-learn's handwritten digits with rmsprop."
    )
    parser.add_argument("--plot", type=Path, default=Path("build/digits.png"))
    path = parser.parse_args().plot

    data = load()
    compare(data)

    runs: dict[str, list[Run]] = {}
    for name, (lr, options) in DIALECTS.items():
        for seed in range(5):
            net = Perceptron(seed)
            opt = RMSprop(net.parameters(), lr=lr, **options)
            bar = name if seed == 0 else ""
            runs.setdefault(name, []).append(train(net, opt, data, seed, bar))
        accuracy = np.mean([run.accuracy[-1] for run in runs[name]])
        print(f"{name}: test accuracy {accuracy:.4f}, mean of 5 seeds")
    plot(runs, path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
