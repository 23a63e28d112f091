"""Installs what is in a folder wherever it should run, imports it, steps and trains: a row each.

    make wheels-test

The folder holds wheels for manylinux2014, x86-64 and aarch64, and the sdist. The same
steps must give the same bits everywhere. Needs CPython 3.10 to 3.13, on the PATH or by
pyenv, and Debian's package qemu-user. (qemu-x86_64 knows no AVX-512.)
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# What a step uses there: NumPy's own wheels need the instructions of 2009.
CPUS = {
    "Nehalem": "sse2",
    "SandyBridge": "sse2",
    "Haswell": "avx2",
    "EPYC": "avx2",
    "Skylake-Client": "avx2",
}
Command = list[str | Path]


def stepped() -> str:
    """A digest of parameters after some steps of four dialects."""
    import rmsprop

    rng, digest = np.random.default_rng(0), hashlib.sha256()
    for dtype in (np.float32, np.float64):
        for name in ("torch", "tf1", "graves", "dqn"):
            shapes = [(7, 5), (1000,), (), (3, 4, 5)]
            params = [np.array(rng.normal(size=shape), dtype) for shape in shapes]
            opt = rmsprop.RMSprop(params, max_grad_norm=10.0, **rmsprop.dialect(name))
            for _ in range(5):
                opt.step(grads=[rng.normal(size=p.shape) for p in params])
            digest.update(b"".join(p.tobytes() for p in params))
    return digest.hexdigest()[:12]


def accuracy(digits: Path) -> float:
    """On the second half of the digits, of a softmax trained on the first."""
    import rmsprop

    data = np.load(digits)
    x, labels = data["x"], data["y"]
    w, b = np.zeros((64, 10), np.float32), np.zeros(10, np.float32)
    opt, half = rmsprop.RMSprop([w, b], lr=3e-3), len(x) // 2
    for _ in range(100):
        p = np.exp(x[:half] @ w + b)
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(half), labels[:half]] -= 1
        opt.step(grads=[x[:half].T @ p / half, p.mean(axis=0)])
    return float(((x[half:] @ w + b).argmax(axis=1) == labels[half:]).mean())


def show(digits: Path) -> None:
    """What a row is checked by."""
    import rmsprop

    print(rmsprop.info()["isa"], stepped(), f"{accuracy(digits):.3f}")


class Place(NamedTuple):
    """Where it should run."""

    name: str
    platform: str
    install: Command
    python: Command
    isa: str | None = None  # None: any
    environment: dict[str, str] | None = None


def interpreters() -> Iterator[tuple[str, Path]]:
    """CPythons by version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in PYTHONS:
        found = [
            *pyenv.glob(f"{version}.*/bin/python"),
            shutil.which(f"python{version}"),
        ]
        if found[0] is None:
            sys.exit(f"wheels: expected CPython {version}, got none")
        yield version, Path(found[0])


def qemu(processor: str) -> str:
    found = shutil.which(f"qemu-{processor}")
    if found is None:
        sys.exit(f"wheels: expected qemu-{processor}, got none: apt install qemu-user")
    return found


def places(dist: Path, arm64: Path, folder: Path) -> Iterator[Place]:
    def one(pattern: str) -> Path:
        found = list(dist.glob(pattern))
        if len(found) != 1:
            sys.exit(f"wheels: expected one {pattern} in {dist}, got {len(found)}")
        return found[0]

    wheel = one("*manylinux2014_x86_64*.whl")
    for version, python in interpreters():
        venv = folder / version
        subprocess.run([python, "-m", "venv", venv], check=True)
        pip: Command = [venv / "bin/python", "-m", "pip", "install", "--quiet"]
        python = venv / "bin/python"
        yield Place(
            f"CPython {version}", "manylinux2014 x86_64", [*pip, wheel], [python]
        )
    nothing: Command = ["true"]
    for cpu, isa in CPUS.items():
        command: Command = [qemu("x86_64"), "-cpu", cpu, python]
        yield Place(f"CPython {version}", f"{cpu} (qemu)", nothing, command, isa)
    venv = folder / "sdist"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [venv / "bin/python", "-m", "pip", "install", "--quiet"]
    name = f"CPython {sys.version_info.major}.{sys.version_info.minor}"
    yield Place(name, "sdist", [*pip, one("*.tar.gz")], [venv / "bin/python"])
    # Debian's Python of that processor, with NumPy's wheel for it.
    site = folder / "aarch64"
    (library,) = (arm64 / "usr/lib").glob("python3.*")
    version = library.name.removeprefix("python")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", site]
    tags = ("manylinux2014_aarch64", "manylinux_2_28_aarch64")
    pip += [f"--platform={tag}" for tag in tags]
    pip += ["--only-binary=:all:", f"--python-version={version}"]
    yield Place(
        f"CPython {version}",
        "manylinux2014 aarch64 (qemu)",
        [*pip, one("*manylinux2014_aarch64*.whl")],
        [qemu("aarch64"), "-cpu", "cortex-a72", "-L", arm64, arm64 / "usr/bin/python3"],
        "baseline",
        {"PYTHONPATH": str(site), "PYTHONHOME": str(arm64 / "usr")},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dist", type=Path, help="wheels and sdist; with --here: digits")
    parser.add_argument("--arm64", type=Path, help="the root of a Debian for aarch64")
    parser.add_argument("--here", action="store_true", help="only what a row runs")
    args = parser.parse_args()
    if args.here:
        return show(args.dist)
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    wanted = stepped()
    print(
        f"{'interpreter':14}{'platform':30}{'install':9}{'import':10}{'steps':14}digits"
    )
    with tempfile.TemporaryDirectory() as folder:
        digits = Path(folder) / "digits.npz"
        np.savez(digits, x=(x / 16).astype(np.float32), y=y)
        for place in places(args.dist.resolve(), args.arm64.resolve(), Path(folder)):
            subprocess.run(place.install, check=True)
            finished = subprocess.run(
                [*place.python, __file__, "--here", digits],
                check=False,
                capture_output=True,
                text=True,
                cwd=folder,
                env={**os.environ, **(place.environment or {})},
            )
            if finished.returncode:
                sys.exit(f"{place.name}, {place.platform}: {finished.stderr}")
            isa, digest, score = finished.stdout.split()
            print(
                f"{place.name:14}{place.platform:30}{'ok':9}{isa:10}{digest:14}{score}"
            )
            if digest != wanted or float(score) < 0.9 or place.isa not in (None, isa):
                sys.exit(
                    f"wheels: expected {place.isa or 'any'} {wanted} and 0.9 or more"
                )


if __name__ == "__main__":
    main()
