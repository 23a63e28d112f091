"""`python -m rmsprop info` and `bench` say what README.md says they do."""

import json
import os
from xml.etree import ElementTree

import pytest
import rmsprop
from rmsprop import machine

BENCH = ("bench", "--cases", "mlp64", "--seconds", "0.01")
ARRAYS = (*BENCH, "--front", "arrays", "--threads", "1")

# As if these were not installed: imports fail and nothing is found.
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))
sys.argv[0] = "python -m rmsprop"
runpy.run_module("rmsprop", run_name="__main__")
"""


@pytest.fixture
def command(run_program):
    """Runs `python -m rmsprop`, perhaps without some packages."""

    def run(*arguments, without=None, **options):
        start = ["-c", WITHOUT, without] if without else ["-m", "rmsprop"]
        return run_program(*start, *arguments, timeout=60, **options)

    return run


def test_info(command):
    lines = command("info").stdout.splitlines()
    said = dict(line.split("  ", 1) for line in lines)
    assert said["rmsprop"].strip() == rmsprop.__version__
    for name in ("instruction set", "threads", "features", "processor", "cores"):
        assert said[name].strip()
    assert (
        len({len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines}) == 1
    )


def test_info_as_json(command):
    said = json.loads(command("info", "--json").stdout)
    assert said["version"] == said["versions"]["rmsprop"] == rmsprop.__version__
    assert said["threads_limit"] != "RMSPROP_NUM_THREADS"
    assert said["isa_limit"] == "the processor"
    assert said["torch_threads"] is None  # not imported, which takes seconds
    assert {"numpy", "python"} <= set(said["versions"])
    assert {"processor", "cores", "usable_cores", "quota"} <= set(said["machine"])
    assert set(said["environment"].values()) == {None}


def test_info_names_the_limits(command):
    environment = {"RMSPROP_NUM_THREADS": "7", "RMSPROP_ISA": "scalar"}
    said = json.loads(command("info", "--json", **environment).stdout)
    assert (said["threads"], said["threads_limit"]) == (7, "RMSPROP_NUM_THREADS")
    assert (said["isa"], said["isa_limit"]) == ("scalar", "RMSPROP_ISA")
    assert said["environment"] == environment


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_info_sees_the_affinity(run_python):
    code = """
import json, os, rmsprop
from rmsprop.__main__ import describe
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
print(json.dumps(describe()))
"""
    said = json.loads(run_python(code))
    assert (said["threads"], said["machine"]["usable_cores"]) == (1, 1)


@pytest.mark.parametrize(
    ("cores", "usable", "quota", "limit"),
    [
        (8, 8, None, "the cores of the machine"),
        (8, None, None, "the cores of the machine"),
        (8, 8, 8.0, "the cores of the machine"),
        (8, 2, None, "the affinity of the process"),
        (8, 2, 4.0, "the affinity of the process"),
        (8, 8, 1.5, "the quota of the cgroup"),
        (8, None, 1.5, "the quota of the cgroup"),
    ],
)
def test_limit_of_threads(cores, usable, quota, limit, monkeypatch):
    monkeypatch.delenv("RMSPROP_NUM_THREADS", raising=False)
    found = {"cores": cores, "usable_cores": usable, "quota": quota}
    assert machine.thread_limit(found) == limit


def test_info_of_a_wrong_environment(command):
    finished = command("info", status=1, RMSPROP_NUM_THREADS="many")
    assert "RMSPROP_NUM_THREADS" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_bench(command, tmp_path):
    """The JSON on stdout, the table on stderr, and the plot, from one run."""
    finished = command(*ARRAYS, "--json", "-", "--plot", "step.svg")
    said = json.loads(finished.stdout)
    assert said["command"].startswith("python -m rmsprop bench --cases mlp64")
    assert said["machine"]["processor"]
    assert said["machine"]["cores"] >= 1
    assert said["versions"]["rmsprop"] == rmsprop.__version__
    assert len(said["date"]) == len("2026-01-01T00:00:00+00:00")
    first, *others = said["results"]
    assert first["rival"] == "rmsprop"
    assert {"numpy", "numpy, tuned"} <= {row["rival"] for row in others}
    for row in said["results"]:
        assert (row["front"], row["case"], row["threads"]) == ("arrays", "mlp64", 1)
        assert row["samples"] >= 5
        for kind in ("median", "min"):
            ratio = row[f"{kind}_us"] / first[f"{kind}_us"]
            assert row[f"{kind}_ratio"] == pytest.approx(ratio)
    assert "numpy, tuned" in finished.stderr
    assert ElementTree.parse(tmp_path / "step.svg").getroot().tag.endswith("svg")


@pytest.mark.skipif(not machine.is_installed("torch"), reason="needs torch")
def test_bench_on_torch(command, tmp_path):
    arguments = (*BENCH, "--front", "torch", "--threads", "1", "--json", "step.json")
    finished = command(*arguments, "--plot", "step.png")
    assert "torch, foreach" in finished.stdout
    said = json.loads((tmp_path / "step.json").read_text())
    assert {"rmsprop", "torch"} <= {row["rival"] for row in said["results"]}
    assert "mlp64" in said["left_out"]["torch.compile"]
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_rivals_that_are_not_installed_are_named(command, tmp_path):
    """And nothing but NumPy is needed."""
    without = "matplotlib,numba,rich,torch,threadpoolctl"
    finished = command(*BENCH, "--json", "step.json", without=without)
    said = json.loads((tmp_path / "step.json").read_text())
    assert said["results"]
    for rival in ("numba", "torch"):
        assert "pip install" in said["left_out"][rival]
        assert f"  {rival}: {said['left_out'][rival]}" in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "without", "message"),
    [
        (["--plot", "step.png"], "matplotlib", "pip install matplotlib"),
        (["--plot", "step.gif"], None, "'step.gif'"),
        (["--plot", "nowhere/step.png"], None, "nowhere"),
        (["--json", "nowhere/step.json"], None, "nowhere"),
        (["--cases", "mlp64,mlp65"], None, "'mlp65'"),
        (["--front", "jax"], None, "'jax'"),
        (["--front", "torch"], "torch", "pip install torch"),
        (["--threads", "0"], None, "'0'"),
    ],
)
def test_what_cannot_be_done_is_said_before_measuring(
    arguments, without, message, command
):
    finished = command("bench", *arguments, without=without, status=2)
    assert message in finished.stderr.splitlines()[-1]
    assert not finished.stdout
