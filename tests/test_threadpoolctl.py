"""Promise: `threadpool_limits` of threadpoolctl limits the threads of every step, whatever `threads` says."""

import numpy as np
import pytest
import rmsprop
from rmsprop import _core
from threadpoolctl import threadpool_info, threadpool_limits


def ours():
    """What threadpoolctl says of rmsprop."""
    return [entry for entry in threadpool_info() if entry["user_api"] == "rmsprop"]


def test_it_is_listed():
    (entry,) = ours()
    assert entry["num_threads"] == rmsprop.info()["threads"]
    assert entry["version"] == rmsprop.__version__


@pytest.mark.parametrize("limits", [1, {"rmsprop": 1}])
def test_limits_nest_and_end(limits):
    with threadpool_limits(3):
        assert ours()[0]["num_threads"] == 3
        with threadpool_limits(limits):
            assert _core._thread_limit() == 1
        assert _core._thread_limit() == 3
    assert _core._thread_limit() is None


def test_a_limit_is_at_least_one():
    with pytest.raises(ValueError, match="non-zero|>= 1|zero"):
        _core._set_thread_limit(0)


def test_a_step_wakes_no_thread(run_python):
    """In an interpreter without other threads of ours."""
    code = """
import os
import time
import numpy as np
import rmsprop
from threadpoolctl import threadpool_limits

def ours():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum(name.startswith("rmsprop") for name in names)

w, g = np.ones(4_000_000, np.float32), np.ones(4_000_000, np.float32)
opt = rmsprop.RMSprop([w], threads=4)
with threadpool_limits(1):
    opt.step(grads=[g])
    print(ours())
opt.step(grads=[g])
most = min(4, rmsprop.info()["threads"]) - 1
until = time.monotonic() + 20
while ours() < most and time.monotonic() < until:  # a thread that is not needed may start late
    time.sleep(0.01)
print(ours(), most)
"""
    limited, free, most = map(int, run_python(code).split())
    assert limited == 0
    assert free == most


def test_the_bits_are_the_same():
    results = []
    for limit in (1, None):
        w = np.ones(1_000_000, np.float32)
        opt = rmsprop.RMSprop([w], threads=2)
        with threadpool_limits(limit, user_api="rmsprop"):
            opt.step(grads=[np.linspace(-1, 1, w.size, dtype=np.float32)])
        results.append(w)
    assert np.array_equal(*results)
