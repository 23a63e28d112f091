"""Safe after fork: a child makes its own pool and never waits for the parent's; the parent goes on.

Each scenario runs in an interpreter of its own with a time limit, so that a hang is a failure.
"""

import pytest

PRELUDE = """
import multiprocessing, os, signal, threading
import numpy as np
from rmsprop import RMSprop

NUMEL = 3_000_000
GRAD = np.full(NUMEL, 0.5, np.float32)

def make(threads):
    param = np.ones(NUMEL, np.float32)
    return param, RMSprop([param], threads=threads)

def after(steps):
    "What every element is after that many steps."
    param = np.ones(1, np.float32)
    opt = RMSprop([param], threads=1)
    for _ in range(steps):
        opt.step(grads=[GRAD[:1]])
    return param[0]

def in_child(check):
    "Forks, runs the check in the child and gives whether it held there; a child that hangs is killed."
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0

param, opt = make(threads=3)

def step_gives(steps):
    opt.step(grads=[GRAD])
    return (param == after(steps)).all()
"""

SCENARIOS = {
    "a child steps, the parent goes on": """
for taken in range(5):
    assert step_gives(taken + 1)
    assert in_child(lambda: step_gives(taken + 2) and step_gives(taken + 3))
""",
    "a grandchild steps": """
assert step_gives(1)
assert in_child(lambda: step_gives(2) and in_child(lambda: step_gives(3)) and step_gives(3))
assert step_gives(2)
""",
    "the pool is first needed in the child": """
assert in_child(lambda: step_gives(1))
assert step_gives(1)
""",
    "workers of multiprocessing": """
assert step_gives(1)
for taken in range(1, 4):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(step_gives, [taken + 1]).get(20) == [True]
    assert step_gives(taken + 1)
""",
    "a child makes an optimizer while another thread of the parent steps": """
stop = threading.Event()
taken = 0
def train():
    global taken
    while not stop.is_set():
        opt.step(grads=[GRAD])
        taken += 1
trainer = threading.Thread(target=train)
trainer.start()
def new_one_steps():
    own, its_opt = make(threads=3)
    its_opt.step(grads=[GRAD])
    return (own == after(1)).all()
try:
    assert all(in_child(new_one_steps) for _ in range(15))
finally:
    stop.set()
    trainer.join()
assert (param == after(taken)).all()
""",
    "a child steps the optimizer that another thread of the parent was stepping": """
stop = threading.Event()
def train():
    while not stop.is_set():
        opt.step(grads=[GRAD])
trainer = threading.Thread(target=train)
trainer.start()
def it_steps_or_refuses():
    "The parent's step is half done for ever in the child's copy; what counts is that nothing hangs."
    try:
        opt.step(grads=[GRAD])
    except RuntimeError:
        pass
    return True
try:
    assert all(in_child(it_steps_or_refuses) for _ in range(15))
finally:
    stop.set()
    trainer.join()
""",
}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_fork(scenario, run_python):
    run_python(PRELUDE + scenario)
