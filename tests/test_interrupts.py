"""Ctrl-C: it is heard while a thread waits for its turn, and leaves a checkpoint loaded or not loaded, never in part."""

import sys

import numpy as np
import pytest
import rmsprop
from problems import random_arrays, random_parameters, snapshot, train
from rmsprop import RMSprop

# --- checkpoints ------------------------------------------------------------------------------


class Interrupted(BaseException):
    """As KeyboardInterrupt, but from nobody else."""


class InterruptAt:
    """Raises at the n-th line of Python that the package runs."""

    def __init__(self, number):
        self.left = number

    def __call__(self, frame, event, _):
        if "rmsprop" not in frame.f_globals.get("__name__", ""):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise Interrupted
        return self

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)

    def __exit__(self, *_):
        sys.settrace(self.before)


def build(seed, contiguous, **options):
    params = random_parameters(0)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1 * seed}]
    opt = RMSprop(groups, contiguous_params=contiguous, **options)
    train(opt, params, range(seed))
    return opt


LOADS = {
    "load_state_dict": lambda opt, saved: opt.load_state_dict(saved),
    "entry": lambda opt, saved: opt.state.__setitem__(1, saved["state"][1]),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True}], ids=str)
def test_interrupted_at_any_line(load, options, contiguous):
    """All is as before, or as after; state that only the checkpoint has is created with the rest."""
    saved = build(2, contiguous, momentum=0.5, centered=True).state_dict()
    opt, done = (build(1, contiguous, **options) for _ in range(2))
    old = snapshot(opt)
    load(done, saved)
    new = snapshot(done)
    assert old != new
    number, found = 0, old
    while True:
        number += 1
        try:
            with InterruptAt(number):
                load(opt, saved)
        except Interrupted:
            found = snapshot(opt)
            assert found in (old, new)
            if found == new:
                opt = build(1, contiguous, **options)
        else:
            break
    assert number > 3
    assert snapshot(opt) == new


def test_interrupted_load_of_a_file(tmp_path, contiguous):
    """Parameters, state and options are all as before, or all as in the file."""
    path = tmp_path / "run"
    rmsprop.save(path, build(2, contiguous))
    opt = build(1, contiguous)
    old = snapshot(opt)
    rmsprop.load(path, opt)
    new = snapshot(opt)
    number, seen = 0, {"old": 0, "new": 0}
    while True:
        number += 1
        opt = build(1, contiguous)
        try:
            with InterruptAt(number):
                rmsprop.load(path, opt)
        except Interrupted:
            found = snapshot(opt)
            assert found in (old, new)
            seen["old" if found == old else "new"] += 1
        else:
            break
    assert min(seen.values()) > 0


CTRL_C = """
import signal, time
from problems import gradients_for, random_arrays, snapshot
from rmsprop import RMSprop

def build(seed):
    params = random_arrays(0, [(50,)] * 200)
    opt = RMSprop(params, momentum=0.9, lr=0.1 * seed)
    for step in range(seed):
        opt.step(grads=gradients_for(params, step))
    return opt

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
opt, old, new = build(1), build(1).state_dict(), build(2).state_dict()
bits = []
for saved in (old, new):
    began = time.perf_counter()
    opt.load_state_dict(saved)
    took = time.perf_counter() - began
    bits.append(snapshot(opt))
heard = 0
for part in range(1, 40):
    opt.load_state_dict(old)
    try:
        signal.setitimer(signal.ITIMER_REAL, took * part / 40)
        opt.load_state_dict(new)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        heard += 1
    assert snapshot(opt) in bits, part
assert heard
"""


def test_checkpoint_that_a_signal_interrupts(run_python):
    run_python(CTRL_C)


# --- waiting for a turn -----------------------------------------------------------------------

# Another thread has the turn, until it is let go on, when the signal comes.
HELD = """
import signal, threading
from collections.abc import Mapping
import numpy as np
from rmsprop import RMSprop

entered, go_on = threading.Event(), threading.Event()

class Blocking(Mapping):
    "Gradients of which the first one takes a long time to come."
    def __getitem__(self, name):
        entered.set()
        go_on.wait(20)
        return np.ones(3, np.float32)
    def __iter__(self):
        return iter("w")
    def __len__(self):
        return 1

def step():
    opt.step(grads=[np.ones(3, np.float32)])

opt = RMSprop({"w": np.zeros(3, np.float32)})
saved = opt.state_dict()
other = threading.Thread(target=lambda: opt.step(grads=Blocking()))
other.start()
entered.wait()

def interrupt(*_):
    if raises:
        raise KeyboardInterrupt
    go_on.set()

signal.signal(signal.SIGALRM, interrupt)
signal.setitimer(signal.ITIMER_REAL, 0.2)
"""

HEARD = """
raises, was_held = True, None
try:
    CALL
except KeyboardInterrupt:
    was_held = other.is_alive()
go_on.set()
other.join()
assert was_held
assert opt.state[0]["step"] == 1
step()
assert opt.state[0]["step"] == 2
"""

CALLS = {
    "step": "step()",
    "state": "opt.state[0]['square_avg']",
    "state_dict": "opt.state_dict()",
    "load_state_dict": "opt.load_state_dict(saved)",
    "add_param_group": "opt.add_param_group({'params': {'v': np.ones(3)}})",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_thread_that_waits_for_its_turn(call, run_python):
    """It hears the signal while the other one still has the turn; later steps go on."""
    run_python(HELD + HEARD.replace("CALL", call), timeout=30)


def test_a_signal_that_raises_nothing(run_python):
    """The step that waits is done when it is its turn."""
    wait = """
raises = False
step()
other.join()
assert opt.state[0]["step"] == 2
"""
    run_python(HELD + wait, timeout=30)


def test_an_interrupted_step_changes_nothing():
    """Here by the gradients, which Python code brings."""

    class Stopping(dict):
        def __getitem__(self, name):
            if name == "b":
                raise KeyboardInterrupt
            return super().__getitem__(name)

    arrays = dict(zip("ab", random_arrays(0, [(5,)] * 2), strict=True))
    opt = RMSprop(arrays)
    before = snapshot(opt)
    with pytest.raises(KeyboardInterrupt):
        opt.step(grads=Stopping(a=np.ones(5), b=np.ones(5)))
    assert snapshot(opt) == before
