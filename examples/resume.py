"""Trains on handwritten digits, saves after each epoch, and goes on where it stopped.

    python examples/resume.py [--file build/resume.safetensors] [--epochs 20]

Stop it in whatever way, start it again: the parameters at the end are those of a run that
was never stopped, bit for bit. Needs scikit-learn and safetensors.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import rmsprop
from sklearn.datasets import load_digits

BATCH, HIDDEN, LR = 32, 128, 5e-4


def initial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "hidden.w": rng.normal(0, 0.18, (64, HIDDEN)).astype(np.float32),
        "hidden.b": np.zeros(HIDDEN, np.float32),
        "out.w": rng.normal(0, 0.12, (HIDDEN, 10)).astype(np.float32),
        "out.b": np.zeros(10, np.float32),
    }


def gradients(
    params: dict[str, np.ndarray], x: np.ndarray, labels: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    """The mean cross-entropy of a batch, and its gradients by name."""
    hidden = np.maximum(x @ params["hidden.w"] + params["hidden.b"], 0)
    logits = hidden @ params["out.w"] + params["out.b"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(p[rows, labels] + 1e-12).mean()
    p[rows, labels] -= 1
    d = p / len(labels)
    d_hidden = (d @ params["out.w"].T) * (hidden > 0)
    return float(loss), {
        "hidden.w": x.T @ d_hidden,
        "hidden.b": d_hidden.sum(axis=0),
        "out.w": hidden.T @ d,
        "out.b": d.sum(axis=0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Trains on handwritten digits, saves after each epoch, and goes on where it stopped."
    )
    parser.add_argument("--file", type=Path, default=Path("build/resume.safetensors"))
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    arguments.file.parent.mkdir(parents=True, exist_ok=True)

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    params = initial()
    opt = rmsprop.RMSprop(params, momentum=0.9)

    first = 0
    if arguments.file.exists():
        first = int(rmsprop.load(arguments.file, opt)["epochs"])
        print(f"going on after {first} epochs")
    for epoch in range(first, arguments.epochs):
        opt.lr = LR * 0.9**epoch
        # What is drawn depends on the epoch alone, so its number is all there is to save.
        order = np.random.default_rng(epoch).permutation(len(images))
        losses = []
        for batch in np.split(order, range(BATCH, len(order), BATCH)):
            loss, grads = gradients(params, images[batch], labels[batch])
            opt.step(grads=grads)
            losses.append(loss)
        rmsprop.save(arguments.file, opt, metadata={"epochs": str(epoch + 1)})
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}", flush=True)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in params.values()))
    print(f"parameters: {digest.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
