"""One wheel serves every CPython from 3.10 on, and the sdist builds.

`pip install .` has no test of its own: it is the sdist test's build in a folder with
more files, and the wheel test, which builds in the source tree, shows that the other
files there, such as the extension that `maturin develop` leaves, stay out.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# A target of its own: pip's build reuses the dependencies, `maturin develop` and
# `cargo test` with their other options cannot evict them.
ENVIRONMENT = {**os.environ, "CARGO_TARGET_DIR": str(ROOT / "target" / "wheel")}

PACKAGE = ("python/**/*.py", "python/**/*.pyi", "python/**/py.typed")
CRATE = (
    "src/**/*.rs",
    "docs/rust.md",
    "examples/*.rs",
    "benches/*.rs",
    "tests/*.rs",
    "Cargo.*",
)
ABOUT = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE-*")

SUITS = """
import sys, sysconfig
sys.exit(
    sys.implementation.name != "cpython"
    or sys.version_info.releaselevel != "final"
    or bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # has no stable ABI to use
)
"""

STEP = """
import sys
from pathlib import Path

import numpy as np
import rmsprop

sys.path.append(sys.argv[1])
from oracle import Oracle

for module in (rmsprop, rmsprop._core):
    assert Path(module.__file__).is_relative_to(sys.prefix), module.__file__

rng = np.random.default_rng(0)
params = [rng.standard_normal(shape).astype(np.float32) for shape in [(64, 33), (5,)]]
wanted = [p.copy() for p in params]
options = {"lr": 0.01, "momentum": 0.9, "centered": True}
opt, oracle = rmsprop.RMSprop(params, **options), Oracle(wanted, **options)
for _ in range(5):
    grads = [rng.standard_normal(p.shape).astype(p.dtype) for p in params]
    opt.step(grads=grads)
    oracle.step(grads)
for got, want in zip(params, wanted, strict=True):
    np.testing.assert_array_equal(got, want)
print("Python", sys.version, "NumPy", np.__version__, rmsprop.info())
"""


def run(*command, cwd=ROOT):
    """Runs a command; what it wrote is the message when it fails."""
    finished = subprocess.run(
        [str(part) for part in command],
        check=False,
        cwd=cwd,
        env=ENVIRONMENT,
        timeout=600,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout
    print(finished.stdout)


def suits(python):
    """Whether it runs (a shim of pyenv may not) and is a CPython that the wheel is for."""
    asked = subprocess.run([python, "-c", SUITS], check=False, capture_output=True)
    return asked.returncode == 0


def other_pythons():
    """One interpreter for each version that the wheel is for, the running one left out."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    folders = [*pyenv.glob("versions/*/bin"), *os.get_exec_path()]
    for minor in range(10, 30):
        found = (shutil.which(f"python3.{minor}", path=folder) for folder in folders)
        python = next(filter(suits, filter(None, found)), None)
        if python and minor != sys.version_info.minor:
            yield pytest.param(python, id=f"3.{minor}")


def install_and_step(python, tmp_path, *what):
    """Installs into a clean environment outside the source tree, and steps there."""
    installed = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "venv", "--without-pip", tmp_path / "venv")
    run(sys.executable, "-m", "pip", "--python", installed, "install", *what)
    run(installed, "-I", "-c", STEP, TESTS, cwd=tmp_path)


def files(*patterns):
    """The files of the source tree that match, as their paths in it."""
    found = (path for pattern in patterns for path in ROOT.glob(pattern))
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    dist = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "maturin", "build", "--release", "--out", dist)
    (built,) = dist.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    dist = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "maturin", "sdist", "--out", dist)
    (built,) = dist.iterdir()
    return built


def test_wheel_is_for_every_cpython_from_3_10(wheel):
    assert wheel.name.startswith("rmsprop-")
    assert "-cp310-abi3-" in wheel.name


def test_wheel_holds_the_package_with_its_types_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {f"python/{n}" for n in archive.namelist() if ".dist-info/" not in n}
    package = files(*PACKAGE)
    assert {"python/rmsprop/py.typed", "python/rmsprop/_core.pyi"} <= package
    assert names == package | {"python/rmsprop/_core.abi3.so"}


def test_rivals_stay_out_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        extras = re.findall(
            "^Provides-Extra: (.+)$", archive.read(metadata).decode(), re.MULTILINE
        )
    assert not [name for name in names if "rivals" in name or "harness" in name]
    assert set(extras) == {"torch", "rl", "safetensors"}


@pytest.mark.parametrize(
    "python",
    [*other_pythons()]
    or [pytest.param("", marks=pytest.mark.skip(reason="no other CPython >= 3.10"))],
)
def test_wheel_steps_in_a_clean_environment(python, wheel, tmp_path):
    install_and_step(python, tmp_path, wheel)


def test_sdist_holds_the_sources_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == files(*PACKAGE, *CRATE, *ABOUT) | {"PKG-INFO"}
    assert sdist.stat().st_size < 500_000


def test_sdist_builds_and_steps_in_a_clean_environment(sdist, tmp_path):
    # Neither tool may answer from its cache: Cargo takes the sdist's files, dated 2006,
    # for those of the wheel, and pip keeps what it built from a file of that path.
    run("cargo", "clean", "--release", "--package", "rmsprop")
    install_and_step(sys.executable, tmp_path, "--no-cache-dir", sdist)


def test_registries_accept_what_is_built(wheel, sdist):
    """Their descriptions render, and the crate's own package builds by itself."""
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    run("cargo", "package", "--quiet", "--allow-dirty")


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < 1 << 20


def test_import_adds_little_to_numpy():
    """5 ms on a machine at rest; a module that took a hundred would be seen here."""
    code = (
        "import time, numpy; start = time.perf_counter(); import rmsprop;"
        " print(time.perf_counter() - start)"
    )
    times = []
    for _ in range(5):
        finished = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        times.append(float(finished.stdout))
    assert min(times) < 0.1
    assert "torch" not in modules_after("import rmsprop")


def modules_after(code):
    """The modules that are there then."""
    show = f"{code}; import sys; print(*sys.modules)"
    command = [sys.executable, "-c", show]
    return subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.split()
