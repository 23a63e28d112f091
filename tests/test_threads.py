"""Threads: two on one optimizer take turns, optimizers run at once, nothing deadlocks, an idle pool costs nothing."""

import os
import threading

import numpy as np
import pytest
from rmsprop import RMSprop

LARGE = 3_000_000
MODERATE = 600_000


def make(numel=MODERATE, threads=2):
    param = np.ones(numel, np.float32)
    return param, RMSprop([param], threads=threads, momentum=0.9)


def gradient(numel=MODERATE):
    return np.linspace(-1, 1, numel, dtype=np.float32)


def run_at_once(*targets):
    """Runs the targets in threads that start together."""
    barrier = threading.Barrier(len(targets))

    def run(target):
        barrier.wait()
        target()

    threads = [
        threading.Thread(target=run, args=[target], daemon=True) for target in targets
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def steps(opt, count, grad):
    def take():
        for _ in range(count):
            opt.step(grads=[grad])

    return take


def test_one_optimizer_from_several_threads_takes_turns():
    grad = gradient()
    (param, opt), (expected, alone) = make(), make(threads=1)
    run_at_once(*[steps(opt, 10, grad)] * 3)
    steps(alone, 30, grad)()
    assert opt.state[0]["step"] == 30
    assert (param == expected).all()


def test_several_optimizers_at_once():
    grad = gradient()
    pairs = [make() for _ in range(3)]
    run_at_once(*(steps(opt, 10, grad) for _, opt in pairs))
    expected, alone = make(threads=1)
    steps(alone, 10, grad)()
    for param, _ in pairs:
        assert (param == expected).all()


def test_others_wait_neither_for_reading_nor_saving():
    """`state_dict`, `repr` and the groups can be read while another thread steps."""
    grad = gradient()
    _, opt = make()

    def read():
        for _ in range(50):
            saved = opt.state_dict()
            assert 0 <= saved["state"][0]["step"] <= 20
            assert repr(opt)

    run_at_once(steps(opt, 20, grad), read)


REENTRANT = """
import numpy as np
from rmsprop import Parameter, RMSprop

entered = []

def once(action):
    if not entered:
        entered.append(True)
        action()

class Meddler(Parameter):
    "Reading its gradient steps, changes or saves the optimizer first."
    @property
    def grad(self):
        once(act)
        return gradient
    @grad.setter
    def grad(self, value):
        pass

def step(): opt.step(grads=[gradient])

numel = {numel}
gradient = np.ones(numel, np.float32)
param = Meddler(np.ones(numel, np.float32))
opt = RMSprop([param], threads=2)
act = {act}
try:
    opt.step(**{step})
except RuntimeError as refused:
    print(refused)
count = opt.state[0]["step"]
opt.step(grads=[gradient] + [None] * (len(opt.state) - 1))
assert opt.state[0]["step"] == count + 1
print(count)
"""

ACTS = {
    "step": "step",
    "save": "opt.state_dict",
    "load": "lambda: opt.load_state_dict(opt.state_dict())",
    "write state": "lambda: opt.state[0].__setitem__('step', 0)",
    "zero_grad": "opt.zero_grad",
    "add a group": "lambda: opt.add_param_group({'params': [np.ones(3, np.float32)]})",
}


@pytest.mark.parametrize("numel", [10, LARGE])
@pytest.mark.parametrize("act", ACTS)
def test_reentrance_from_a_gradient_does_not_hang(act, numel, run_python):
    """Either it works or it is refused with a RuntimeError; the optimizer works on."""
    run_python(REENTRANT.format(act=ACTS[act], numel=numel, step="{}"))


CROSSED = """
import threading
import numpy as np
from producers import Versioned
from rmsprop import RMSprop

COUNT = {count}
opts = [RMSprop([np.zeros(3, np.float32)]) for _ in range(COUNT)]
met = threading.Barrier(COUNT)
said = []

class Crossing(Versioned):
    "A gradient for which the next optimizer is stepped, once all are inside a step of their own."
    def __init__(self, index):
        super().__init__(np.ones(3, np.float32))
        self.next = opts[(index + 1) % COUNT]
    def __dlpack__(self, **keywords):
        met.wait()
        try:
            self.next.step(grads=[self.array])
        except RuntimeError as error:
            said.append(str(error))
        return super().__dlpack__(**keywords)

threads = [
    threading.Thread(target=lambda k=k: opts[k].step(grads=[Crossing(k)]))
    for k in range(COUNT)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
steps = sum(opt.state[0]["step"] for opt in opts)
assert steps == 2 * COUNT - len(said), (steps, said)
print(len(said))
"""


@pytest.mark.parametrize("count", [2, 3])
def test_optimizers_that_wait_for_each_other(count, run_python):
    """One at least is told so, instead of all waiting for ever; the others get their turn."""
    assert 1 <= int(run_python(CROSSED.format(count=count))) <= count


def test_reentrance_from_a_closure_steps_twice(run_python):
    code = REENTRANT.format(
        act="step",
        numel=10,
        step="{'closure': lambda: once(step), 'grads': [gradient]}",
    )
    assert run_python(code) == "2\n"


COUNT = """
import os, sys
import numpy as np
from rmsprop import RMSprop

{before}

def new_threads(numel, **options):
    "How many threads a step of an optimizer leaves behind."
    param = np.ones(numel, np.float32)
    earlier = len(os.listdir("/proc/self/task"))
    RMSprop([param], **options).step(grads=[np.ones_like(param)])
    return len(os.listdir("/proc/self/task")) - earlier
print(new_threads({numel}, **{options}))
"""


def new_threads(run_python, options=None, numel=LARGE, before="", **environment):
    code = COUNT.format(before=before, numel=numel, options=options or {})
    return int(run_python(code, **environment))


def test_one_thread_makes_no_pool(run_python):
    assert new_threads(run_python, {"threads": 1}) == 0


def test_small_work_makes_no_pool(run_python):
    assert new_threads(run_python, {"threads": 4}, numel=1000) == 0


def test_threads_argument(run_python):
    """The calling thread takes its share, so the pool is at most that large."""
    assert 1 <= new_threads(run_python, {"threads": 3}) <= 3


@pytest.mark.parametrize(
    ("options", "environment"),
    [({"threads": 10**6}, {}), ({}, {"RMSPROP_NUM_THREADS": "1000000"})],
    ids=["argument", "variable"],
)
def test_no_more_threads_than_there_are_processors(options, environment, run_python):
    made = new_threads(run_python, options, numel=8_000_000, **environment)
    assert made <= len(os.sched_getaffinity(0)) + 4


@pytest.mark.parametrize(("variable", "least", "most"), [("1", 0, 0), ("3", 1, 3)])
def test_environment_variable(variable, least, most, run_python):
    made = new_threads(run_python, RMSPROP_NUM_THREADS=variable)
    assert least <= made <= most


def test_argument_goes_before_environment_variable(run_python):
    assert new_threads(run_python, {"threads": 1}, RMSPROP_NUM_THREADS="3") == 0


def test_affinity_is_respected(run_python):
    before = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    assert new_threads(run_python, before=before) == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="has no affinity")
def test_workers_run_where_their_caller_may(run_python):
    """Also if that changes; where it is one core, on the caller's."""
    code = f"""
import os
import numpy as np
from rmsprop import RMSprop

param = np.ones({LARGE}, np.float32)
opt = RMSprop([param], threads=4)

def step():
    opt.step(grads=[np.ones_like(param)])
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{{task}}/comm") as file:
            if file.read().startswith("rmsprop"):
                yield os.sched_getaffinity(int(task))

cores = os.sched_getaffinity(0)
assert all(found <= cores for found in step())
one = {{min(cores)}}
os.sched_setaffinity(0, one)
assert all(found for found in step())
os.sched_setaffinity(0, cores)
assert all(found <= cores for found in step())
print(opt.state[0]["step"])
"""
    assert run_python(code) == "3\n"


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_bad_environment_variable(value, monkeypatch):
    monkeypatch.setenv("RMSPROP_NUM_THREADS", value)
    with pytest.raises(ValueError, match=rf"RMSPROP_NUM_THREADS.*{value}"):
        make(threads=None)


@pytest.mark.parametrize("numel", [100_000, MODERATE])
def test_steps_without_a_pause_on_threads_that_stay_awake(numel):
    grad = gradient(numel)
    (param, opt), (expected, alone) = make(numel), make(numel, threads=1)
    steps(opt, 200, grad)()
    steps(alone, 200, grad)()
    assert (param == expected).all()


@pytest.mark.parametrize("count", [1, 100])
def test_idle_pool_burns_no_cpu(count, run_python):
    code = f"""
import time
import numpy as np
from rmsprop import RMSprop

param = np.ones(600_000, np.float32)
opt = RMSprop([param], threads=3)
for _ in range({count}):
    opt.step(grads=[np.ones_like(param)])
time.sleep(0.1)
before = time.process_time()
time.sleep(1)
print(time.process_time() - before)
"""
    assert float(run_python(code)) < 0.05
