"""The programs in benches/ run and print what they say."""

import json
import sys
import time
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import rmsprop
from rmsprop.machine import is_installed

NEEDED = ("stable_baselines3", "sklearn", "matplotlib")
pytestmark = pytest.mark.skipif(
    not all(map(is_installed, NEEDED)), reason=f"needs {', '.join(NEEDED)}"
)

BENCHES = Path(__file__).parents[1] / "benches"
LOOP = str(BENCHES / "loop.py")
BRIEFLY = ("--seconds", "0.1", "--rounds", "2", "--json", "loop.json")
STEP = str(BENCHES / "step.py")
CONTENDERS = {
    "a2c": ["torch", "rmsprop, SB3 clips", "rmsprop"],
    "a2c-sb3": ["RMSpropTFLike", "rmsprop, SB3 clips", "rmsprop"],
    "impala": ["torch", "rmsprop"],
    "digits": ["NumPy by hand", "rmsprop"],
    "conv": ["torch", "rmsprop"],
    "numpy-1m": ["NumPy by hand", "rmsprop, threads=1", "rmsprop, threads=2"],
}

# As if these were not installed.
WITHOUT = """
import os, runpy, sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))
sys.argv.pop(0)
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def loop(monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)
    return import_module("loop")


def test_step(run_program, tmp_path):
    """Every kind of case is measured on the fronts that have it, ours first."""
    cases = (
        "mlp64,mlp64-schedule,mlp64-clip,mlp64-cold,backward-5k,groups,odd,1m-float64"
    )
    options = ("--cases", cases, "--threads", "1", "--seconds", "0.01", "--no-compile")
    printed = run_program(STEP, *options, "--json", "step.json").stdout
    said = json.loads((tmp_path / "step.json").read_text())
    assert said["command"].startswith("python benches/step.py --cases mlp64,")
    assert said["machine"]["processor"]
    assert said["versions"]["rmsprop"] == rmsprop.__version__
    assert len(said["date"]) == len("2026-01-01T00:00:00+00:00")
    found = {}
    for row in said["results"]:
        assert row["threads"] == 1
        assert row["samples"] >= 5
        assert 0 < row["min_us"] <= row["median_us"] <= row["p90_us"]
        assert f"\n  {row['contender']}  " in printed
        found.setdefault((row["case"], row["front"]), []).append(row["contender"])
    both = {"mlp64", "mlp64-cold", "groups"}
    assert {case for case, front in found if front == "arrays"} == {*both, "1m-float64"}
    torch_only = {"mlp64-schedule", "mlp64-clip", "backward-5k", "odd"}
    assert {case for case, front in found if front == "torch"} == both | torch_only
    for (case, front), names in found.items():
        assert names[0] == "rmsprop"
        assert f"\n{case}: " in printed
        if front == "torch":
            assert "torch, foreach" in names
    assert {"numpy", "numpy, tuned"} <= set(found["mlp64", "arrays"])
    assert "rmsprop, a group each" in found["groups", "arrays"]
    assert "rmsprop, a group each" in found["groups", "torch"]
    assert "rmsprop, two odd ones more" in found["odd", "torch"]
    # Until gradients of another type are taken, the table says that they are not.
    taken, left_out = set(found["1m-float64", "arrays"]), said["left_out"]
    ours = "rmsprop, float64 gradients"
    assert (ours in taken) != (f"{ours} in 1m-float64" in left_out)


def test_rivals_that_are_not_installed_are_named(run_program, tmp_path):
    """And nothing but NumPy is needed."""
    without = "matplotlib,numba,torch,threadpoolctl"
    options = ("--cases", "mlp64,groups", "--seconds", "0.01", "--json", "step.json")
    finished = run_program("-c", WITHOUT, without, STEP, *options)
    said = json.loads((tmp_path / "step.json").read_text())
    assert {row["case"] for row in said["results"]} == {"mlp64", "groups"}
    for rival in ("numba", "torch"):
        assert f"  {rival}: {said['left_out'][rival]}" in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "without", "message"),
    [
        (["--json", "nowhere/step.json"], "none", "nowhere"),
        (["--cases", "mlp64,mlp65"], "none", "'mlp65'"),
        (["--front", "jax"], "none", "'jax'"),
        (["--front", "torch"], "torch", "not installed"),
        (["--threads", "0"], "none", "'0'"),
    ],
)
def test_step_says_what_it_cannot_do_before_measuring(
    arguments, without, message, run_program
):
    finished = run_program("-c", WITHOUT, without, STEP, *arguments, status=2)
    assert message in finished.stderr.splitlines()[-1]
    assert not finished.stdout


def test_loop(run_program, tmp_path):
    """Every loop and contender is measured, and is in the table and in the JSON."""
    loops = ("--loops", ",".join(CONTENDERS))
    printed = run_program("-W", "error", LOOP, *loops, *BRIEFLY).stdout
    said = json.loads((tmp_path / "loop.json").read_text())
    assert said["command"].startswith("python benches/loop.py --loops a2c,")
    assert said["left_out"] == {}
    found = {}
    for row in said["results"]:
        found.setdefault(row["loop"], []).append(row["contender"])
        in_numpy = row["loop"] in ("digits", "numpy-1m")
        assert 0 < row["step_share"] < 1
        assert 0 < row["step_us"] < row["update_us"]
        assert 0 <= row["clip_share"] < 1
        if row["contender"] == "rmsprop" or in_numpy:
            assert row["clip_share"] < 0.01
        else:
            assert 0 < row["clip_us"] < row["update_us"]
        low, high = row["speedup_quartiles"]
        assert 0 < low <= row["speedup"] <= high
        assert row["speedup"] == 1 or "rmsprop" in row["contender"]
        assert row["rounds"] >= 2
        assert row["threads"] == (2 if row["loop"] == "numpy-1m" else 1)
    assert found == CONTENDERS
    tables = dict(part.split(":", 1) for part in printed.split("\n\n")[1:])
    assert list(tables) == list(CONTENDERS)
    for name, table in tables.items():
        for line, contender in zip(table.splitlines()[2:], CONTENDERS[name]):
            assert line.startswith(f"  {contender}  ")


def test_loops_without_what_they_need_are_named(run_program, tmp_path):
    """And the others are measured."""
    arguments, without = ("--loops", "a2c,impala,digits", *BRIEFLY), "gymnasium"
    printed = run_program("-c", WITHOUT, without, LOOP, *arguments).stdout
    said = json.loads((tmp_path / "loop.json").read_text())
    assert set(said["left_out"]) == {"a2c", "impala"}
    for name, reason in said["left_out"].items():
        assert f"\n  {name}: {reason}\n" in printed
    assert [row["contender"] for row in said["results"]] == CONTENDERS["digits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loops", "a2c,a3c"], "'a3c'"),
        (["--rounds", "1"], "--rounds"),
        (["--json", "nowhere/loop.json"], "nowhere"),
    ],
)
def test_loop_says_what_it_cannot_do_before_measuring(arguments, message, run_program):
    finished = run_program(LOOP, *arguments, status=2)
    assert message in finished.stderr.splitlines()[-1]
    assert not finished.stdout


def test_picture(run_program, tmp_path):
    """The same numbers make the same two pictures, which are not the same."""
    measured = ("--loops", "digits,conv", "--seconds", "0.1", "--json", "loop.json")
    run_program(LOOP, *measured)
    drawn = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        run_program(str(BENCHES / "picture.py"), "loop.json", "--to", folder)
        themes = [tmp_path / folder / f"speed-{t}.svg" for t in ("light", "dark")]
        drawn.append([path.read_bytes() for path in themes])
        for path in themes:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


def rows(run_program, tmp_path, program, *arguments):
    """What such a program measured: by front and more, the time of each contender."""
    brief = ("--seconds", "0.05", "--json", "found.json")
    path = str(BENCHES / program)
    printed = run_program("-W", "error", path, *arguments, *brief).stdout
    said = json.loads((tmp_path / "found.json").read_text())
    found = {}
    for row in said["results"]:
        assert 0 < row["median_us"] <= row["p90_us"]
        assert row["samples"] >= 5
        keys = (
            "front",
            "way",
            "busy",
            "size",
            "tensors",
            "form",
            "p_offset",
            "g_offset",
        )
        place = tuple(row[key] for key in keys if key in row)
        found.setdefault(place, {})[row["contender"]] = row["median_us"]
        for key in ("size", "tensors", "elements"):
            assert f"{row.get(key, 0):,}" in printed
    return found


def test_tensors(run_program, tmp_path):
    found = rows(run_program, tmp_path, "tensors.py", "--sizes", "1,20")
    assert set(found) == set(product(("arrays", "torch"), (1, 20)))
    for contenders in found.values():
        assert {"rmsprop, contiguous"} < set(contenders)


def test_threads(run_program, tmp_path):
    options = ("--sizes", "1000,300000", "--front", "arrays", "--busy", "0,1")
    found = rows(run_program, tmp_path, "threads.py", *options, "--threads", "2")
    places = product(["arrays"], ("hot", "paced"), (0, 1), (1000, 300_000))
    assert set(found) == set(places)
    for contenders in found.values():
        assert {"rmsprop, threads=1", "rmsprop, threads=2"} <= set(contenders)


def test_placements(run_program, tmp_path):
    options = ("--elements", "5000", "--offsets", "0,64")
    found = rows(run_program, tmp_path, "placements.py", *options)
    forms = ("plain", "momentum", "centered", "centered, momentum")
    assert set(found) == set(product(forms, (0, 64), (0, 64)))
    for contenders in found.values():
        assert "rmsprop" in contenders


def test_steps_in_a_backward_of_many_tensors(run_program, tmp_path):
    found = rows(run_program, tmp_path, "backward.py", "--tensors", "5,20")
    assert set(found) == {(5,), (20,)}
    for contenders in found.values():
        assert {"rmsprop, after", "rmsprop, in"} < set(contenders)


def test_backward(run_program, tmp_path):
    program, small = str(BENCHES / "backward.py"), ("--width", "16", "--layers", "2")
    brief = ("--seconds", "0.05", "--no-peak", "--json", "backward.json")
    printed = run_program("-W", "error", program, *small, *brief).stdout
    said = json.loads((tmp_path / "backward.json").read_text())
    assert said["width"] == 16
    names = [row["contender"] for row in said["results"]]
    assert names[:2] == ["rmsprop, after", "rmsprop, in"]
    for row in said["results"]:
        assert 0 < row["min_us"] <= row["median_us"]
        assert f"\n  {row['contender']}  " in printed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_backward_tells_gradients_at_once_from_those_one_by_one(
    run_program, monkeypatch
):
    """Of some 67 MB, where memory is given back at once."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "100000")
    program, size = str(BENCHES / "backward.py"), ("--width", "1024", "--layers", "16")
    peaks = [
        float(
            run_program(program, *size, "--peak-of", f"no step, dropped {when}").stdout
        )
        for when in ("after", "in")
    ]
    assert peaks[0] > 60
    assert peaks[1] < 30


def training(loop, rate):
    """A loop that only sleeps, for three times as long in the step as outside it."""
    p = np.zeros(3)

    def step():
        time.sleep(3e-3)
        p[:] -= rate

    optimizer = SimpleNamespace(step=step)

    def run(updates):
        for _ in range(updates):
            time.sleep(1e-3)
            optimizer.step()

    return loop.Training(run, optimizer, [p])


def test_share_of_the_step(loop):
    contenders = {"first": lambda: training(loop, 1.0)}
    (row,) = loop.measure(contenders, seconds=0.1, rounds=2)
    assert 0.4 < row["step_share"] < 0.9
    assert row["clip_share"] == 0
    assert row["speedup"] == 1


def test_contenders_that_learn_something_else_are_refused(loop):
    contenders = {
        "first": lambda: training(loop, 1.0),
        "same": lambda: training(loop, 1.0),
        "other": lambda: training(loop, 1.0 + 1e-3),
    }
    with pytest.raises(AssertionError, match="other"):
        loop.measure(contenders, seconds=0.1, rounds=2)
