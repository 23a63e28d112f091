"""`python -m rmsprop info` and `bench` say what README.md says they do."""

import json
import os
import re

import numpy as np
import pytest
import rmsprop
from rmsprop import bench, machine
from rmsprop.__main__ import main

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


def test_alone(command):
    """It says what there is."""
    assert {"info", "bench", "--version"} <= set(
        re.findall(r"[\w-]+", command().stdout)
    )
    assert command("--version").stdout == f"{rmsprop.__version__}\n"


def test_a_wrong_instruction_set(command):
    finished = command("info", status=1, RMSPROP_ISA="avx9")
    (line,) = finished.stderr.splitlines()
    assert "RMSPROP_ISA" in line
    assert "avx9" in line


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_interrupted(monkeypatch, capsys):
    def interrupt(threads):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", interrupt)
    assert main(["bench"]) == 130
    assert capsys.readouterr().err.strip() == "python -m rmsprop bench: interrupted"


def times(printed):
    """Of the table that `bench` prints: microseconds of a step and of a loop."""
    found = {}
    for line in printed.splitlines():
        if re.search(r"\d+x[ ?]$", line):
            cells = re.sub("[x,?]", "", line[20:]).split()
            found[line[:20].strip()] = tuple(map(float, cells))
    return found


def test_bench(command):
    """All that is installed is in the table, beside ours of the same front."""
    printed = command("bench").stdout
    assert printed.startswith(f"rmsprop {rmsprop.__version__}, {rmsprop.info()['isa']}")
    found = times(printed)
    wanted = ["rmsprop", "NumPy by hand"]
    wanted += ["numba's loop"] * machine.is_installed("numba")
    if machine.is_installed("torch"):
        wanted += ["rmsprop.torch", "torch.optim"]
    assert list(found) == wanted
    for name, (step_us, of_step, loop_us, of_loop) in found.items():
        ours = found["rmsprop.torch" if "torch" in name else "rmsprop"]
        assert of_step == pytest.approx(step_us / ours[0], rel=0.01)
        assert of_loop == pytest.approx(loop_us / ours[2], rel=0.01)
    assert "left out" not in printed or len(wanted) < 5
    said = re.search(
        r"^Beside NumPy by hand, a step is (\S+) times", printed, re.MULTILINE
    )
    assert float(said[1]) == pytest.approx(found["NumPy by hand"][1], rel=0.1)


def test_rivals_that_are_not_installed_are_named(command):
    """And nothing but NumPy is needed."""
    printed = command("bench", without="numba,torch,threadpoolctl").stdout
    assert list(times(printed)) == ["rmsprop", "NumPy by hand"]
    for rival in ("numba", "torch"):
        assert re.search(f"^left out: .*{rival}", printed, re.MULTILINE)


def test_bench_compares_what_is_the_same():
    """Ours and its rivals update alike."""
    params, *data = bench.arrays("a loop")
    by_hand, ours = [p.copy() for p in params], [p.copy() for p in params]
    step = bench.by_hand(by_hand)
    opt = rmsprop.RMSprop(ours, **bench.HYPER)
    moved = {"by hand": by_hand, "ours": ours}
    if machine.is_installed("numba"):
        moved["numba"] = [p.copy() for p in params]
        by_numba = bench.by_numba(moved["numba"])
    for _ in range(3):
        grads = bench.backward(by_hand, *data)
        step(grads)
        opt.step(grads=grads)
        if "numba" in moved:
            by_numba(grads)
    for arrays in moved.values():
        for p, start, wanted in zip(arrays, params, by_hand):
            assert (p != start).any()
            np.testing.assert_allclose(p, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not machine.is_installed("torch"), reason="needs torch")
def test_gradients_of_the_loop_are_those_of_torch():
    import torch

    params, x, wanted = bench.arrays("a loop")
    tensors = [torch.from_numpy(p).requires_grad_() for p in params]
    y = torch.from_numpy(x)
    for k in range(0, 6, 2):
        y = (y.relu() if k else y) @ tensors[k] + tensors[k + 1]
    (0.5 * (y - torch.from_numpy(wanted)).square().mean()).backward()
    for tensor, grad in zip(tensors, bench.backward(params, x, wanted)):
        np.testing.assert_allclose(tensor.grad.numpy(), grad, rtol=1e-4, atol=1e-6)


def test_bench_says_what_it_cannot_do_before_measuring(command):
    finished = command("bench", "--threads", "0", status=2)
    assert "--threads" in finished.stderr.splitlines()[-1]
    assert not finished.stdout
