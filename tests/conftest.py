"""Fixtures that several promises share."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("suite", deadline=None, max_examples=60)
hypothesis.settings.load_profile("suite")


@pytest.fixture(params=[False, True], ids=["separate", "contiguous"])
def contiguous(request):
    """Both values of `contiguous_params`: it changes speed only."""
    return request.param


@pytest.fixture
def run_python():
    """Runs code in a fresh interpreter with a time limit, so that a hang is a failure; gives its output."""

    inherited = {
        key: value for key, value in os.environ.items() if key != "RMSPROP_NUM_THREADS"
    }

    def run(code, timeout=60, **environment):
        finished = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            cwd=Path(__file__).parent,
            env={**inherited, **environment},
            timeout=timeout,
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return run


@pytest.fixture
def run_program(tmp_path):
    """Runs Python with these arguments in an empty folder, without variables of ours; gives what came of it."""

    def run(*arguments, status=0, timeout=100, **environment):
        inherited = {k: v for k, v in os.environ.items() if "RMSPROP" not in k}
        finished = subprocess.run(
            [sys.executable, *arguments],
            check=False,
            cwd=tmp_path,
            env={**inherited, **environment},
            timeout=timeout,
            capture_output=True,
            text=True,
        )
        assert finished.returncode == status, finished.stderr
        return finished

    return run
