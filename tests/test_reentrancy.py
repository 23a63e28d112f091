"""Python code that runs during a step can neither crash it nor half update it.

Such code is a `.grad` property, an array's `__dlpack__`, a number's `__float__`, a finalizer. What might crash or hang
runs in an interpreter of its own.
"""

import numpy as np
import pytest
import torch
from problems import NAMES, bits, random_arrays, random_parameters, snapshot, train
from producers import Versioned
from rmsprop import Parameter, RMSprop
from torch.overrides import TorchFunctionMode


class Weights(np.ndarray):
    """An array whose gradient is what a function makes."""

    @property
    def grad(self):
        return self.make_grad()


def weights(array, make_grad):
    array = array.view(Weights)
    array.make_grad = make_grad
    return array


class Acting(Versioned):
    """A gradient that does something while it is read."""

    def __init__(self, array, action):
        super().__init__(array)
        self.action = action

    def __dlpack__(self, **keywords):
        self.action()
        return super().__dlpack__(**keywords)


# --- memory that goes away --------------------------------------------------------------------

# The second parameter's gradient is read after the first one's. The arrays are large enough to be
# mappings of their own: what is let go is unmapped, and touching it is a crash.
GOES_AWAY = """
import numpy as np, torch
from rmsprop import Parameter, RMSprop
from test_reentrancy import weights

NUMEL = 10_000_000
first = weights(np.ones(NUMEL, np.float32), lambda: grad)
second = weights(np.ones(4, np.float32), lambda: (change(), np.ones(4, np.float32))[1])
opt = RMSprop([first, second])
array = grad = np.ones(NUMEL, np.float32)
state = opt.state[0]["square_avg"].base

{what}

try:
    opt.step()
except ValueError as error:
    assert "{culprit}" in str(error), error
else:
    raise AssertionError
assert (first == 1).all() and (second == 1).all()
assert [opt.state[index]["step"] for index in range(2)] == [0, 0]
"""


@pytest.mark.parametrize(
    ("culprit", "what"),
    [
        ("gradient 0", "change = lambda: array.resize(1, refcheck=False)"),
        (
            "gradient 0",
            "grad = Parameter(array); change = lambda: array.resize(1, refcheck=False)",
        ),
        (
            "gradient 0",
            "grad = torch.ones(NUMEL); change = lambda: setattr(grad, 'data', torch.ones(1))",
        ),
        ("state of group 0", "change = lambda: state.resize(1, refcheck=False)"),
    ],
    ids=["ndarray", "Parameter", "tensor", "state"],
)
def test_memory_that_a_later_property_lets_go(culprit, what, run_python):
    run_python(GOES_AWAY.format(culprit=culprit, what=what))


def test_a_parameter_that_a_later_gradient_moves(contiguous):
    """The step takes it where it then is, or not at all."""
    params = random_parameters(0)
    opt = RMSprop(params, contiguous_params=contiguous)
    old = params[0].data
    before = bits([old, params[1:], opt.state_dict()])

    def move(to):
        grad = np.ones((2, 3, 4), np.float32)
        params[3].grad = Acting(grad, lambda: setattr(params[0], "data", to))

    move(np.zeros((7, 6), np.float32))
    with pytest.raises(ValueError, match=r"parameter 0.*\(7, 5\).*\(7, 6\)"):
        opt.step()
    assert bits([old, params[1:], opt.state_dict()]) == before
    move(np.zeros((7, 5), np.float32))
    opt.step()
    assert bits(old) == before[0]
    assert (params[0].data != 0).all()


class Moving(TorchFunctionMode):
    """Gives a tensor other memory as soon as torch is asked for anything."""

    def __init__(self, tensor):
        super().__init__()
        self.tensor, self.has_moved = tensor, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not self.has_moved:
            self.has_moved = True
            self.tensor.data = torch.full_like(self.tensor, 2)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("index", [0, 1])
def test_a_parameter_that_moves_while_another_one_cannot_be_read(index):
    """Memory that it has left is not written, whatever is asked of the other one, which has no gradient."""
    tensors = [torch.ones(8), torch.ones(8)]
    moving, lost = tensors[index], tensors[1 - index]
    opt = RMSprop(tensors, lr=0.5)
    grads = [np.ones(8, np.float32)] * 2
    opt.step(grads=grads)
    torch.utils.swap_tensors(lost, torch.empty(8, device="meta"))
    old = moving.detach()
    before = old.clone()
    grads[1 - index] = None
    with Moving(moving) as mode:
        try:
            opt.step(grads=grads)
        except (RuntimeError, TypeError, ValueError):
            assert torch.equal(old, before)
            assert opt.state[index]["step"] == 1
            return
    assert opt.state[index]["step"] == 2
    assert torch.equal(old, before) == mode.has_moved
    assert (moving != (2 if mode.has_moved else before)).all()


# --- calls from inside a step -----------------------------------------------------------------


def build(contiguous):
    params = random_parameters(0)
    opt = RMSprop(params, momentum=0.9, contiguous_params=contiguous)
    train(opt, params, range(2))
    return params, opt


CALLS = {
    "step": lambda opt, saved: opt.step(),
    "state": lambda opt, saved: opt.state[0]["square_avg"],
    "state_dict": lambda opt, saved: opt.state_dict(),
    "load_state_dict": lambda opt, saved: opt.load_state_dict(saved),
    "add_param_group": lambda opt, saved: opt.add_param_group(
        {"params": [Parameter(np.zeros(2))]}
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_from_inside_a_step(call, contiguous):
    """It raises, and so does the step; afterwards the optimizer goes on as if neither had been."""
    (params, opt), (expected_params, expected) = build(contiguous), build(contiguous)
    before, saved = snapshot(opt), opt.state_dict()
    refused = []

    def act():
        with pytest.raises(RuntimeError, match="inside its own step") as caught:
            call(opt, saved)
        refused.append(caught)
        raise caught.value

    params[2].grad = Acting(params[2].grad, act)
    with pytest.raises((RuntimeError, ValueError), match="inside its own step"):
        opt.step()
    assert len(refused) == 1
    assert snapshot(opt) == before
    train(opt, params, [2])
    train(expected, expected_params, [2])
    assert snapshot(opt) == snapshot(expected)


class Finalized(np.ndarray):
    """A gradient that does something when it is let go."""

    action = None

    def __del__(self):
        if self.action:
            self.action()


def test_a_step_from_the_finalizer_of_a_gradient():
    refused = []

    def step():
        with pytest.raises(RuntimeError, match="inside its own step") as caught:
            opt.step(grads=[np.ones(5)])
        refused.append(caught)

    def make_grad():
        grad = np.ones(5).view(Finalized)
        grad.action = step
        return grad

    param, expected = np.zeros(5), np.zeros(5)
    opt = RMSprop([weights(param, make_grad)])
    for _ in range(2):
        opt.step()
    assert len(refused) == 2
    assert opt.state[0]["step"] == 2
    reference = RMSprop([expected])
    for _ in range(2):
        reference.step(grads=[np.ones(5)])
    assert bits(param) == bits(expected)


LET_GO = """
import numpy as np
from rmsprop import RMSprop

class Note:
    def __del__(self):
        seen.append(opt.param_groups)

seen = []
opt = RMSprop([np.zeros(4, np.float32)])
replacement = [dict(opt.param_groups[0])]
opt.param_groups[0]["note"] = Note()
opt.param_groups = replacement
assert len(seen) == 1 and seen[0] is replacement
"""


def test_a_finalizer_may_read_the_groups_that_replace_its_own(run_python):
    run_python(LET_GO, timeout=20)


# --- containers that change while they are read -----------------------------------------------


def as_list(grads):
    return grads, grads.clear


def as_mapping(grads):
    grads = dict(zip(NAMES, grads, strict=True))
    return grads, lambda: grads.pop("fc.weight", None)


@pytest.mark.parametrize("hand_over", [as_list, as_mapping])
def test_gradients_that_vanish(hand_over):
    params = dict(zip(NAMES, random_arrays(0), strict=True))
    opt = RMSprop(params)
    before = snapshot(opt)
    first, *rest = random_arrays(1)
    grads, shrink = hand_over([Acting(first, lambda: shrink()), *rest])
    with pytest.raises(ValueError, match="grad"):
        opt.step(grads=grads)
    assert snapshot(opt) == before


class Fading:
    """A learning rate that ends once it was read."""

    def __init__(self, group):
        self.group = group

    def __float__(self):
        self.group["lr"] = 0.0
        return 0.5


def test_a_number_that_edits_its_group():
    """The next step goes by the group as it is then."""
    (param,), (grad,) = random_arrays(0, [(5,)]), random_arrays(1, [(5,)])
    expected = param.copy()
    opt = RMSprop([param])
    opt.param_groups[0]["lr"] = Fading(opt.param_groups[0])
    opt.step(grads=[grad])
    RMSprop([expected], lr=0.5).step(grads=[grad])
    assert bits(param) == bits(expected)
    opt.step(grads=[grad])
    assert bits(param) == bits(expected)


# --- exceptions -------------------------------------------------------------------------------


class StopHere(BaseException):
    """Nothing that anybody expects, as KeyboardInterrupt."""


def stop(*_):
    raise StopHere


class Stopping(dict):
    """A mapping that cannot be read, and a number that cannot."""

    __getitem__ = __float__ = stop


RAISES = {
    "property": lambda opt, grads: opt.step(),
    "__dlpack__": lambda opt, grads: opt.step(
        grads=[*grads[:3], Acting(grads[3], stop)]
    ),
    "mapping": lambda opt, grads: opt.step(
        grads=Stopping(zip(NAMES, grads, strict=True))
    ),
    "iterator": lambda opt, grads: opt.step(grads=map(stop, grads)),
    "__float__": lambda opt, grads: (
        opt.param_groups[0].update(lr=Stopping()),
        opt.step(grads=grads),
    ),
}


@pytest.mark.parametrize("act", RAISES.values(), ids=RAISES)
def test_exceptions_pass_and_nothing_changes(act):
    arrays, grads = random_arrays(0), random_arrays(1)
    make_grads = [*(grad.copy for grad in grads[:3]), stop]
    params = map(weights, arrays, make_grads)
    opt = RMSprop(dict(zip(NAMES, params, strict=True)))
    before = bits([arrays, opt.state_dict()["state"]])
    with pytest.raises(StopHere):
        act(opt, grads)
    assert bits([arrays, opt.state_dict()["state"]]) == before
    opt.param_groups[0]["lr"] = 0.5
    opt.step(grads=grads)
    assert [opt.state[index]["step"] for index in range(4)] == [1] * 4
