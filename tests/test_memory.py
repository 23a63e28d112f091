"""Memory: the optimizer holds its state and a constant; after the first step nothing that grows with the parameters.

The resident size is measured in interpreters of their own, where nothing else comes and goes.
"""

import contextlib
import gc
import sys
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from problems import random_arrays
from producers import Handmade, Versioned
from rmsprop import Parameter, RMSprop

RESIDENT = """
import resource
import numpy as np
from rmsprop import Parameter, RMSprop

NUMEL = 8_000_000

def resident():
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * resource.getpagesize()

def peak():
    # Not ru_maxrss: that includes what the parent had resident when it forked.
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def full(dtype=np.float32, value=1):
    return np.full(NUMEL, value, dtype)
"""


@pytest.mark.parametrize(
    ("options", "dtype", "bytes_per_element"),
    [
        ("{}", "float32", 4),
        ("{}", "float64", 8),
        ("{'momentum': 0.9}", "float32", 8),
        ("{'momentum': 0.9, 'centered': True}", "float32", 12),
        ("{'max_grad_norm': 1.0, 'nonfinite': 'skip', 'threads': 2}", "float32", 4),
    ],
)
def test_the_optimizer_holds_its_state_and_a_constant(
    options, dtype, bytes_per_element, run_python
):
    code = f"""{RESIDENT}
param, grad = full("{dtype}"), full("{dtype}")
before = resident()
opt = RMSprop([param], **{options})
opt.step(grads=[grad])
print((resident() - before) / NUMEL)
"""
    held = float(run_python(code))
    assert bytes_per_element - 0.05 < held < bytes_per_element + 0.4


def test_contiguous_parameters_move_and_leave_nothing_behind(run_python):
    code = f"""{RESIDENT}
param = Parameter(full())
param.grad = full()
before = resident()
opt = RMSprop([param], contiguous_params=True)
opt.step()
print((resident() - before) / NUMEL)
"""
    assert float(run_python(code)) < 4.4


def test_reported_state_is_all_there_is():
    params = random_arrays(0)
    numel = sum(param.size for param in params)
    state = RMSprop(params).state
    arrays = [
        value
        for entry in state.values()
        for value in entry.values()
        if not isinstance(value, int)
    ]
    assert sum(array.nbytes for array in arrays) == 4 * numel


LAYOUTS = {
    "dense": "[full()], [full()]",
    "strided": "[full()[::2]], [full()[::-2]]",
    "two layouts": "[full().reshape(2000, -1)], [full().reshape(-1, 2000).T]",
    "contiguous": "[Parameter(full())], [full()]",
}


@pytest.mark.parametrize(
    "options",
    [
        "{}",
        "{'momentum': 0.9, 'centered': True, 'weight_decay': 0.1, 'maximize': True}",
        "{'max_grad_norm': 1.0, 'nonfinite': 'skip', 'threads': 3}",
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_resident_size_does_not_grow_after_the_first_step(
    layout, options, run_python
):
    """Not even for a moment: the peak counts."""
    code = f"""{RESIDENT}
params, grads = {LAYOUTS[layout]}
opt = RMSprop(params, **{options}, contiguous_params={layout == "contiguous"})
opt.step(grads=grads)
before = peak()
for _ in range(3):
    opt.step(grads=grads)
print((peak() - before) / NUMEL)
"""
    assert float(run_python(code)) < 0.1


def python_allocations(action):
    """The most that Python's allocators, NumPy's included, gave out above the start."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        action()
        peak = tracemalloc.get_traced_memory()[1]
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    return after - before, peak - before


MAKE_GRADIENT = {
    "ndarray": lambda array: array,
    "Parameter": Parameter,
    "tensor": torch.from_numpy,
    "versioned capsule": Versioned,
    "capsule": Handmade,
    "buffer": memoryview,
}


@pytest.mark.parametrize("kind", MAKE_GRADIENT)
def test_a_step_allocates_no_arrays(kind):
    params, grads = (
        random_arrays(0, [(300_000,)] * 2),
        random_arrays(1, [(300_000,)] * 2),
    )
    made = [MAKE_GRADIENT[kind](grad) for grad in grads]
    opt = RMSprop(params, max_grad_norm=1.0, threads=2)
    opt.step(grads=made)
    _, peak = python_allocations(lambda: opt.step(grads=made))
    assert peak < 20_000


@pytest.mark.parametrize("kind", MAKE_GRADIENT)
def test_many_steps_leak_nothing(kind):
    params, grads = random_arrays(0), random_arrays(1)
    made = [MAKE_GRADIENT[kind](grad) for grad in grads]
    opt = RMSprop(params, momentum=0.9)

    def train():
        for _ in range(10_000):
            opt.step(grads=made)

    opt.step(grads=made)
    references = [sys.getrefcount(one) for one in (*params, *grads, *made)]
    kept, _ = python_allocations(train)
    assert kept < 5_000
    assert [sys.getrefcount(one) for one in (*params, *grads, *made)] == references


def test_many_failures_leak_nothing():
    params, grads = random_arrays(0), random_arrays(1)
    made = [*map(Handmade, grads[:3]), grads[3][:1]]
    opt = RMSprop(params)

    def fail():
        refused = (
            0  # counted by hand, for pytest.raises makes and keeps objects of its own
        )
        for _ in range(1_000):
            try:
                opt.step(grads=made)
            except ValueError:
                refused += 1
        assert refused == 1_000

    fail()
    references = [sys.getrefcount(one) for one in (*params, *made)]
    kept, _ = python_allocations(fail)
    assert kept < 5_000
    assert [sys.getrefcount(one) for one in (*params, *made)] == references
    assert all(one.given_back == one.handed_out for one in made[:3])


def test_the_resident_size_stays_over_many_steps(run_python):
    code = f"""{RESIDENT}
params = [Parameter(np.ones(100, np.float32)) for _ in range(6)]
opt = RMSprop(params, max_grad_norm=1.0)

def train(steps):
    for _ in range(steps):
        for param in params:
            param.grad = np.ones(100, np.float32)
        opt.step()
        opt.zero_grad(set_to_none=True)

train(500)
before = resident()
train(10_000)
print(resident() - before)
"""
    assert int(run_python(code)) < 500_000


def test_capsules_are_given_back_once():
    (array, other), grads = random_arrays(0, [(5,)] * 2), random_arrays(1, [(5,)] * 2)
    made = [Handmade(one) for one in (array, other, *grads)]
    opt = RMSprop(made[:2])
    for _ in range(3):
        opt.step(grads=made[2:])
    del opt
    gc.collect()
    assert all(one.handed_out > 0 for one in made)
    assert [one.given_back for one in made] == [one.handed_out for one in made]


class Subclass(np.ndarray):
    """An array that can be referred to weakly, and can refer to others."""


def of_new_class(kind):
    """An object of a class that nobody else has."""

    class Plain:
        """No array at all."""

    class Shown(Versioned):
        """An array behind capsules."""

    class Claiming(Versioned):
        """Says of the exchange API that it has it, which is not so."""

        __dlpack_c_exchange_api__ = torch.Tensor.__dlpack_c_exchange_api__

    class Tensor(torch.Tensor):
        """Has inherited it."""

    match kind:
        case "tensor":
            return torch.ones(3).as_subclass(Tensor)
        case "plain":
            return Plain()
        case "capsule":
            return Shown(np.ones(3, np.float32))
        case "exchange API":
            return Claiming(np.ones(3, np.float32))


@pytest.mark.parametrize("role", ["parameter", "gradient", "state"])
@pytest.mark.parametrize("kind", ["plain", "capsule", "exchange API", "tensor"])
def test_classes_of_arrays_are_let_go(kind, role):
    """Whether they were taken or refused."""
    opt = RMSprop([np.ones(3, np.float32)])
    given = of_new_class(kind)
    uses = {
        "parameter": lambda: RMSprop([given]),
        "gradient": lambda: opt.step(grads=[given]),
        "state": lambda: opt.state[0].update(square_avg=given),
    }
    for _ in range(2):
        with contextlib.suppress(TypeError, ValueError):
            uses[role]()
    remaining = weakref.ref(type(given))
    given = None
    gc.collect()
    assert remaining() is None


@pytest.mark.parametrize("step_first", [False, True])
@pytest.mark.parametrize(
    "make",
    [lambda array: array.view(Subclass), type("Subclass", (Parameter,), {})],
    ids=["ndarray", "Parameter"],
)
def test_a_parameter_that_knows_its_optimizer_goes_with_it(make, step_first):
    """As one does whose hook steps the optimizer during the backward pass."""
    param = make(random_arrays(0)[0])
    param.opt = RMSprop([param])
    if step_first:
        param.opt.step(grads=random_arrays(1)[:1])
    remaining = weakref.ref(param)
    del param
    gc.collect()
    assert remaining() is None


def test_the_optimizer_lets_go_of_its_parameters():
    params = [Parameter(array) for array in random_arrays(0)]
    references = [sys.getrefcount(param) for param in params]
    opt = RMSprop(params)
    opt.step(grads=random_arrays(1))
    del opt
    gc.collect()
    assert [sys.getrefcount(param) for param in params] == references
