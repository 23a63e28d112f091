"""The programs in benches/ run and print what they say.

Those of a step are `python -m rmsprop bench`, which tests/test_command.py runs.
"""

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rmsprop.machine import is_installed

NEEDED = ("stable_baselines3", "sklearn", "matplotlib")
pytestmark = pytest.mark.skipif(
    not all(map(is_installed, NEEDED)), reason=f"needs {', '.join(NEEDED)}"
)

BENCHES = Path(__file__).parents[1] / "benches"
LOOP = str(BENCHES / "loop.py")
BRIEFLY = ("--seconds", "0.1", "--rounds", "2", "--json", "loop.json")
CONTENDERS = {
    "a2c": ["torch", "rmsprop, SB3 clips", "rmsprop"],
    "a2c-sb3": ["RMSpropTFLike", "rmsprop, SB3 clips", "rmsprop"],
    "impala": ["torch", "rmsprop"],
    "digits": ["NumPy by hand", "rmsprop"],
    "conv": ["torch", "rmsprop"],
}

# As if these were not installed.
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def loop(monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)
    return import_module("loop")


def test_loop(run_program, tmp_path):
    """Every loop and contender is measured, and is in the table and in the JSON."""
    printed = run_program("-W", "error", LOOP, *BRIEFLY).stdout
    said = json.loads((tmp_path / "loop.json").read_text())
    assert said["command"].startswith("python benches/loop.py --seconds 0.1")
    assert said["left_out"] == {}
    found = {}
    for row in said["results"]:
        found.setdefault(row["loop"], []).append(row["contender"])
        assert 0 < row["step_share"] < 1
        assert 0 < row["step_us"] < row["update_us"]
        assert 0 <= row["clip_share"] < 1
        if row["contender"] == "rmsprop" or row["loop"] == "digits":
            assert row["clip_share"] < 0.01
        else:
            assert 0 < row["clip_us"] < row["update_us"]
        low, high = row["speedup_quartiles"]
        assert 0 < low <= row["speedup"] <= high
        assert row["speedup"] == 1 or "rmsprop" in row["contender"]
        assert row["rounds"] >= 2
        assert row["threads"] == 1
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
        assert f"\n{name}: left out: {reason}\n" in printed
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


def points(run_program, tmp_path, program, *arguments):
    """What a sweep measured, by (front, way, size); its table goes to stdout."""
    brief = ("--seconds", "0.05", "--json", "sweep.json")
    printed = run_program(
        "-W", "error", str(BENCHES / program), *arguments, *brief
    ).stdout
    said = json.loads((tmp_path / "sweep.json").read_text())
    found = {}
    for point in said["results"]:
        assert 0 < point["median_us"] <= point["p90_us"]
        assert point["samples"] >= 5
        place = point["front"], point["way"], point["size"]
        found.setdefault(place, {})[point["contender"]] = point["median_us"]
        assert f"{point['size']:,}" in printed
    return found


def test_tensors(run_program, tmp_path):
    found = points(
        run_program, tmp_path, "tensors.py", "--sizes", "1,20", "--plot", "t.svg"
    )
    assert {place[0] for place in found} == {"arrays", "torch"}
    assert len(found) == 4
    for contenders in found.values():
        assert {"rmsprop, contiguous"} < set(contenders)
    assert (tmp_path / "t.svg").read_text().startswith("<?xml")


def test_threads(run_program, tmp_path):
    options = ("--sizes", "1000,300000", "--front", "arrays", "--busy", "0,1")
    found = points(run_program, tmp_path, "threads.py", *options, "--plot", "t.png")
    ways = {f"{way}, {count} busy" for way in ("hot", "paced") for count in (0, 1)}
    assert set(found) == {("arrays", w, n) for w in ways for n in (1000, 300_000)}
    for contenders in found.values():
        assert {"rmsprop, 1 thread", "rmsprop, forced"} < set(contenders)
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_backward(run_program, tmp_path):
    program, small = str(BENCHES / "backward.py"), ("--width", "16", "--layers", "2")
    brief = ("--seconds", "0.05", "--no-peak", "--json", "backward.json")
    printed = run_program("-W", "error", program, *small, *brief).stdout
    said = json.loads((tmp_path / "backward.json").read_text())
    assert said["width"] == 16
    names = [row["contender"] for row in said["results"]]
    assert names[:2] == ["rmsprop, after", "rmsprop, in"]
    for row in said["results"]:
        assert 0 < row["min_ms"] <= row["median_ms"]
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
