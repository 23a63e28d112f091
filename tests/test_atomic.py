"""What fails leaves everything as it was: constructors, added groups, checkpoints, and steps that run out of memory.

Steps that are refused for their input are in test_bad_input.py.
"""

import contextlib

import numpy as np
import pytest
from problems import (
    bits,
    gradients_for,
    random_arrays,
    random_parameters,
    snapshot,
    train,
)
from producers import Versioned
from rmsprop import Parameter, RMSprop

OPTIONS = {"momentum": 0.9, "centered": True}


def build(contiguous, **options):
    """Two groups of two parameters, after two steps."""
    params = random_parameters(0)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}]
    opt = RMSprop(groups, **{**OPTIONS, **options}, contiguous_params=contiguous)
    train(opt, params, range(2))
    return params, opt


# --- constructors and added groups ------------------------------------------------------------


def readonly(param):
    param.data.flags.writeable = False
    return param


def sliding(param):
    """Parameters that have all but one element in common."""
    return [Parameter(param.data[1:]), Parameter(param.data[:-1])]


def fresh():
    """Parameters of both types with gradients, that nobody has moved yet."""
    params = [Parameter(array) for array in random_arrays(5, [(4,), (3, 2)])]
    params.append(Parameter(np.ones(5)))
    for param, grad in zip(params, gradients_for(params, 6), strict=True):
        param.grad = grad
    return params


# What is wrong with a group of these parameters, of which only the last is bad, or with its options.
BAD_GROUPS = {
    "option": lambda good, last: {"params": [*good, last], "lr": -1.0},
    "option of another type": lambda good, last: {"params": [*good, last], "eps": "x"},
    "same twice": lambda good, last: {"params": [*good, last, last]},
    "read-only": lambda good, last: {"params": [*good, readonly(last)]},
    "overlap": lambda good, last: {"params": [*good, *sliding(last)]},
    "not an array": lambda good, last: {"params": [*good, last, None]},
    "names": lambda good, last: {"params": [*good, last], "param_names": ["w"]},
}
bad_groups = pytest.mark.parametrize("spoil", BAD_GROUPS.values(), ids=BAD_GROUPS)


class Untouched:
    """Parameters that must keep the very arrays they have, with every bit in them."""

    def __init__(self, params):
        self.params = params
        self.arrays = [(param.data, param.grad) for param in params]
        self.bits = bits(self.arrays)

    def check(self):
        now = [(param.data, param.grad) for param in self.params]
        for (data, grad), (old_data, old_grad) in zip(now, self.arrays, strict=True):
            assert data is old_data
            assert grad is old_grad
        assert bits(now) == self.bits


@bad_groups
def test_constructor(spoil, contiguous):
    """The parameters of a good first group are not moved either."""
    first, second = fresh(), fresh()
    untouched = Untouched(first + second)
    bad = spoil(second[:-1], second[-1])
    with pytest.raises((TypeError, ValueError)):
        RMSprop([{"params": first}, bad], contiguous_params=contiguous)
    untouched.check()
    RMSprop(first, contiguous_params=contiguous).step()
    assert all((param.data != old).all() for param, old in zip(first, fresh()))


@bad_groups
def test_add_param_group(spoil, contiguous):
    """Later groups and steps are as if it had not been tried."""
    (params, opt), (expected_params, expected) = build(contiguous), build(contiguous)
    added = fresh()
    untouched = Untouched(params + added)
    before, groups = snapshot(opt), list(opt.param_groups)
    bad = spoil(added[:-1], added[-1])
    keys = set(bad)
    with pytest.raises((TypeError, ValueError)):
        opt.add_param_group(bad)
    untouched.check()
    assert set(bad) == keys
    assert snapshot(opt) == before
    assert all(one is two for one, two in zip(opt.param_groups, groups, strict=True))
    assert len(opt.state) == 4

    for one, its_params in ((opt, params), (expected, expected_params)):
        its_params += fresh()
        one.add_param_group({"params": its_params[4:], "lr": 0.1})
        train(one, its_params, [2, 3])
    assert snapshot(opt) == snapshot(expected)


# --- checkpoints ------------------------------------------------------------------------------


class Growing(Versioned):
    """An array that is longer each time it is exported."""

    def __dlpack__(self, **keywords):
        exported = super().__dlpack__(**keywords)
        self.array = np.append(self.array, self.array[:1])
        return exported


def with_step(step):
    return lambda saved: saved["state"][3].update(step=step)


def with_numbers(*numbers):
    return lambda saved: saved["param_groups"][1].update(params=numbers)


BAD_CHECKPOINTS = {
    "step of 65 bits": ("step of parameter 3.*18446744073709551616", with_step(2**64)),
    "step of 65 bits, as a float": ("step of parameter 3", with_step(2.0**64)),
    "infinite step": ("step of parameter 3.*inf", with_step(float("inf"))),
    "step as text": ("step of parameter 3.*'3'", with_step("3")),
    "step as bytes": ("step of parameter 3.*b'3'", with_step(b"3")),
    "number twice in a group": ("each parameter once", with_numbers(2, 2)),
    "number in two groups": ("each parameter once", with_numbers(1, 3)),
    "numbers that are lists": ("state_dict: expected", with_numbers([2], [3])),
    "array that grows": (
        r"square_avg of parameter 1.*\(11,\).*\(12,\)",
        lambda saved: saved["state"][1].update(square_avg=Growing(np.ones(11, "f4"))),
    ),
}


@pytest.mark.parametrize(
    ("message", "spoil"), BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS
)
def test_checkpoint(message, spoil, contiguous):
    """Whatever comes before what is wrong is good, and is not loaded."""
    _, opt = build(contiguous)
    _, other = build(contiguous, lr=5.0)
    saved = other.state_dict()
    for entry in saved["state"].values():
        entry["square_avg"] += 1
    spoil(saved)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert snapshot(opt) == before


@pytest.mark.parametrize("step", [2**64, 2.0**64, "3", b"3"])
def test_assigned_step(step):
    _, opt = build(contiguous=False)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="step of parameter 1"):
        opt.state[1]["step"] = step
    with pytest.raises(ValueError, match="step of parameter 1"):
        opt.state[1] = {"step": step, "grad_avg": np.ones(11, np.float32)}
    assert snapshot(opt) == before


def test_greatest_step(contiguous):
    """It is kept to the last digit, and stays the greatest."""
    params, opt = build(contiguous, bias_correction=True)
    saved = opt.state_dict()
    saved["state"][1]["step"] = 2**64 - 1
    opt.load_state_dict(saved)
    assert opt.state[1]["step"] == 2**64 - 1
    train(opt, params, [2])
    assert [opt.state[index]["step"] for index in range(4)] == [3, 2**64 - 1, 3, 3]
    assert np.isfinite(params[1].data).all()


# --- steps ------------------------------------------------------------------------------------


def test_norm_of_a_step_that_raises(contiguous):
    """`last_grad_norm` stays that of the last step there was."""
    params, opt = build(contiguous, max_grad_norm=1.0, nonfinite="raise")
    before = opt.last_grad_norm, opt.skipped_steps, snapshot(opt)
    params[2].grad[...] = np.nan
    with pytest.raises(FloatingPointError, match="gradient 2"):
        opt.step()
    assert (opt.last_grad_norm, opt.skipped_steps, snapshot(opt)) == before
    assert opt.last_grad_norm > 0


def bad_gradient(params, opt):
    params[3].grad = np.ones(7, np.float32)


def no_gradient(params, opt):
    params[3].grad = "gradient"


def infinite_gradient(params, opt):
    opt.nonfinite = "raise"
    params[3].grad[...] = np.inf


def skipped_step(params, opt):
    opt.nonfinite = "skip"
    params[3].grad[...] = np.inf


def bad_group(params, opt):
    opt.param_groups[1]["lr"] = -1.0


SPOILS = (bad_gradient, no_gradient, infinite_gradient, skipped_step, bad_group)


@pytest.mark.parametrize("spoil", SPOILS)
def test_state_of_an_option_that_was_just_switched_on(spoil, contiguous):
    """It is not there after a step that failed, nor in its checkpoint, and starts at the next."""
    (params, opt), (expected_params, expected) = (
        build(contiguous, momentum=0.0, centered=False) for _ in range(2)
    )
    before = bits(opt.state_dict()["state"])
    for group in opt.param_groups:
        group.update(OPTIONS)
    spoil(params, opt)
    for _ in range(2):
        with contextlib.suppress(FloatingPointError, TypeError, ValueError):
            opt.step()
        assert bits(opt.state_dict()["state"]) == before
    opt.nonfinite = "propagate"
    for one, its_params in ((opt, params), (expected, expected_params)):
        for group in one.param_groups:
            group.update(OPTIONS)
        one.param_groups[1]["lr"] = 0.01
        train(one, its_params, [2, 3])
    assert snapshot(opt) == snapshot(expected)


OUT_OF_MEMORY = """
import contextlib, resource
import numpy as np
from problems import bits, snapshot
from rmsprop import Parameter, RMSprop

NUMEL = 16_000_000  # of 4 bytes: allocations of their own, whatever memory there is already

@contextlib.contextmanager
def room_for(arrays):
    "Lets the process grow by so many arrays; what does not fit is a MemoryError."
    with open("/proc/self/statm") as numbers:
        size = int(numbers.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + int(4 * NUMEL * arrays), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)

def fails(action):
    try:
        action()
    except MemoryError:
        return
    raise AssertionError("there was room")

def parameter():
    param = Parameter(np.zeros(NUMEL, np.float32))
    param.grad = np.ones(NUMEL, np.float32)
    return param

def make(**options):
    param = parameter()
    opt = RMSprop([param], threads=1, contiguous_params={contiguous}, **options)
    opt.step()
    return param, opt, opt.param_groups[0]

def add_group():
    opt.add_param_group({{"params": [other]}})
"""

SHORTAGES = {
    "constructor": """
param = parameter()
data, grad = param.data, param.grad
with room_for(0.5):
    fails(lambda: RMSprop([param], contiguous_params={contiguous}))
assert param.data is data and param.grad is grad
RMSprop([param], contiguous_params={contiguous}).step()
""",
    "add_param_group": """
param, opt, group = make()
other = parameter()
data, before = other.data, snapshot(opt)
with room_for(0.5):
    fails(add_group)
assert snapshot(opt) == before and other.data is data
opt.step()
add_group()
opt.step()
assert [opt.state[index]["step"] for index in range(2)] == [3, 1]
""",
    "step": """
param, opt, group = make()
before = bits([param, opt.state_dict()["state"]])
group.update(centered=True, momentum=0.9)
for _ in range(2):
    with room_for(1.5):
        fails(opt.step)
assert bits([param, opt.state_dict()["state"]]) == before
group["momentum"] = 0.0
with room_for(1.5):
    opt.step()
assert list(opt.state[0]) == ["step", "square_avg", "grad_avg"]
same, expected, group = make()
group["centered"] = True
expected.step()
assert snapshot(opt) == snapshot(expected)
""",
    "step with other parameters": """
param, opt, group = make()
others = group["params"]
other = parameter()
group.update(params=(other,), momentum=0.9)
with room_for(0.5):
    fails(opt.step)
assert (other.data == 0).all()
group.update(params=others, momentum=0.0)
opt.add_param_group({{"params": [other]}})
opt.step()
assert [opt.state[index]["step"] for index in range(2)] == [2, 1]
""",
    "checkpoint": """
param, opt, group = make()
saved = make(centered=True, momentum=0.9)[1].state_dict()
before = snapshot(opt)
for room in (0.5, 1.5, 2.5, 3.5, 4.5):
    with room_for(room):
        fails(lambda: opt.load_state_dict(saved))
    assert snapshot(opt) == before
opt.load_state_dict(saved)
assert bits(opt.state_dict()["state"]) == bits(saved["state"])
""",
}


@pytest.mark.parametrize("shortage", SHORTAGES.values(), ids=SHORTAGES)
def test_out_of_memory(shortage, contiguous, run_python):
    """Something that needs less works afterwards."""
    run_python((OUT_OF_MEMORY + shortage).format(contiguous=contiguous))


# The lists that an optimizer keeps of its parameters, in steps from no room at all to enough.
SMALL_ONES = """
import contextlib, gc, resource
import numpy as np


@contextlib.contextmanager
def room_for(size):
    with open("/proc/self/statm") as numbers:
        used = int(numbers.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)

def outcomes(action, has_changed):
    "What happens with ever more room: nothing, until it works."
    size, failures = 1 << 18, 0
    while True:
        gc.collect()
        try:
            with room_for(size):
                action()
        except MemoryError:
            assert not has_changed()
            failures += 1
        else:
            assert failures
            return
        size = int(1.25 * size)
"""

MANY = {
    "constructor and step": """
from rmsprop import RMSprop

COUNT = 100_000
memory = np.ones(COUNT, np.float32)
params = list(memory.reshape(-1, 1))
grads = list(np.ones((COUNT, 1), np.float32))

outcomes(lambda: RMSprop(params).step(grads=grads), lambda: (memory != 1).any())
assert (memory != 1).all()
""",
    "named parameters": """
from rmsprop import RMSprop

COUNT = 100_000
memory = np.ones(COUNT, np.float32)
params = {{f"the parameter {{k}}": row for k, row in enumerate(memory.reshape(-1, 1))}}
grads = dict.fromkeys(params, np.ones(1, np.float32))

outcomes(lambda: RMSprop(params).step(grads=grads), lambda: (memory != 1).any())
assert (memory != 1).all()
""",
    "torch": """
import torch
from rmsprop.torch import RMSprop

memory = torch.ones(20_000)
params = list(memory.reshape(-1, 1))
for param in params:
    param.grad = torch.ones(1)
stock = torch.optim.RMSprop(params, lr=0.0, foreach=False)
stock.step()

def step():
    opt = RMSprop(params)
    opt.state.update(stock.state)
    opts.append(opt)
    opt.step()

opts = []
outcomes(step, lambda: opts.clear() or bool((memory != 1).any()))
assert bool((memory != 1).all())
""",
}


@pytest.mark.parametrize("what", MANY.values(), ids=MANY)
def test_out_of_memory_for_many_small_parameters(what, run_python):
    """A MemoryError and nothing changed, whatever there is room for."""
    run_python(
        (SMALL_ONES + what).format(), timeout=200
    )  # torch alone takes 30 s at times
