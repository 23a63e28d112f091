"""examples/a2c.py and examples/impala.py do what their first lines promise.

Each runs in a process group of its own with a time limit, so that a hang is a failure and nobody stays behind.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("stable_baselines3")

EXAMPLES = Path(__file__).parents[1] / "examples"
IMPALA = (str(EXAMPLES / "impala.py"), "--checkpoint", "impala.pt")


@pytest.fixture
def start(tmp_path):
    """Starts Python in an empty folder; kills what is left of its process group in the end."""
    # What a shell started in the background ignores Ctrl-C, and so would what that starts.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = []

    def run(*arguments):
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=tmp_path,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    signal.signal(signal.SIGINT, handler)
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def start_learning(start):
    """Starts the learner with these arguments; gives it and its actors after ten updates."""

    def run(*arguments):
        process = start(*arguments, "--save-every", "10")
        line = process.stdout.readline()
        assert line.startswith("update 10: "), line + process.stderr.read()
        actors = psutil.Process(process.pid).children()
        assert len(actors) == 2
        return process, actors

    return run


def output(process, code=0, timeout=60):
    """Waits for the end; gives what was printed if the exit code is that one."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, out + err
    return out + err


def left_behind(group):
    """The processes of a group that still run."""
    alive = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group:
                alive.append(process)
    return [p for p in alive if p.info["status"] != psutil.STATUS_ZOMBIE]


def test_a2c_compares_four_optimizers(start, tmp_path):
    arguments = ("--steps", "1000", "--rounds", "1", "--plot", "curves/a2c.png")
    out = output(start(str(EXAMPLES / "a2c.py"), *arguments))
    rows = re.findall(r"^(.+?)  +(\S+)%  +(\S+)  +(\S+)  +(\S+)$", out, re.MULTILINE)
    assert [row[0] for row in rows] == [
        "torch.optim.RMSprop",
        "rmsprop",
        "SB3's RMSpropTFLike",
        'rmsprop, dialect("sb3")',
    ]
    for _, share, step_us, speed, reward in rows:
        assert 0 < float(share) < 50
        assert 0 < float(step_us)
        assert 0 < float(speed.replace(",", ""))
        assert 8 <= float(reward) <= 500
    torch_us, ours_us, sb3_us, dialect_us = (float(row[2]) for row in rows)
    assert ours_us < torch_us / 2
    assert dialect_us < sb3_us / 2
    verdicts = re.findall(
        r"against .*: (all \d+ episodes equal|episodes differ after step [\d,]+)", out
    )
    assert len(verdicts) == 2
    assert (tmp_path / "curves" / "a2c.png").stat().st_size > 10_000


def test_impala_is_interrupted_and_resumes(start, start_learning):
    """With the checkpoints of the other optimizer, both ways."""
    process, _ = start_learning(*IMPALA)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to all of them
    out = output(process, code=130, timeout=20)
    assert "Traceback" not in out
    assert not left_behind(process.pid)
    count = int(re.search(r"interrupted at update (\d+)", out)[1])

    for optimizer in ("torch", "rmsprop"):
        arguments = ("--resume", "--optimizer", optimizer, "--updates", str(count + 25))
        process = start(*IMPALA, *arguments)
        out = output(process)
        assert not left_behind(process.pid)
        assert f"resumed at update {count}\n" in out
        count += 25
        assert f"update {count}: mean return" in out
        ((speed, share),) = re.findall(r"([\d.,]+) updates/s.*\(([\d.]+)%\)", out)
        assert 0 < float(speed)
        assert 0 < float(share) < 60


def test_impala_fails_when_an_actor_dies(start_learning):
    process, actors = start_learning(*IMPALA)
    actors[0].kill()
    out = output(process, code=1, timeout=20)
    assert re.search(r"RuntimeError: ForkProcess-\d+ ended with -9", out)
    assert not left_behind(process.pid)


def test_impala_fails_when_nothing_moves(start_learning):
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import impala\n"
        "impala.PATIENCE = 3\n"
        "impala.main()"
    )
    process, actors = start_learning("-c", code, *IMPALA[1:])
    for actor in actors:
        actor.suspend()
    assert process.wait(timeout=20) == 1
    for actor in actors:
        actor.resume()
    assert "Timeout (0:00:03)!" in output(process, code=1)
    until = time.monotonic() + 20
    while left_behind(process.pid):  # actors whose parent has died end themselves
        assert time.monotonic() < until
        time.sleep(0.1)
