"""Promise: autograd, its modes, `torch.compile` and hooks on gradients see a step of ours as they see one of torch's."""

import copy
import threading

import pytest
import torch
from rmsprop.torch import RMSprop
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch_pairs import (
    CLASSES,
    FORMS,
    Side,
    assert_close,
    assert_same,
    bits,
    both,
    build,
    normal,
    parameters,
    snapshot,
    train_both,
)

form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


# --- version counters -------------------------------------------------------------------------


def versions(tensors):
    return [tensor._version for tensor in tensors]


@form
def test_versions_of_parameters_rise_and_of_gradients_do_not(form):
    for cls in CLASSES:
        side = build(cls, **form)
        for seed in range(3):
            side.set_gradients(seed)
            grads = [param.grad for param in side.params]
            before = versions(side.params), versions(grads)
            side.opt.step()
            after = versions(side.params), versions(grads)
            assert all(map(int.__lt__, before[0], after[0]))
            assert after[1] == before[1]


def copied(opt):
    """State that a checkpoint brought."""
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def replaced(opt):
    for state in opt.state.values():
        for key in ARRAYS:
            state[key] = state[key].clone()


def exchanged(opt):
    """State that was created for another parameter."""
    params = opt.param_groups[0]["params"]
    first, second = (opt.state[p] for p in params[:2])
    for key in ARRAYS:
        first[key], second[key] = second[key], first[key]


def moved(opt):
    for p in opt.param_groups[0]["params"]:
        p.data = p.data.clone()


def swapped(opt):
    """What `Module.to` and `load_state_dict` can be told to do: other tensors in the same objects."""
    for p in opt.param_groups[0]["params"]:
        p.grad = None
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone()))


def inherited(opt):
    """Other parameters in the same memory, with the same state."""
    params = opt.param_groups[0]["params"]
    for k, p in enumerate(params):
        params[k] = torch.nn.Parameter(p.data)
        opt.state[params[k]] = opt.state.pop(p)


ARRAYS = ("square_avg", "momentum_buffer", "grad_avg")
EDITS = {
    f.__name__: f for f in (copied, replaced, exchanged, moved, swapped, inherited)
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("numel", [100, 10_000])
def test_every_write_is_counted(edit, numel):
    """Of small tensors too, of whose state autograd is told together."""
    params = [normal(k, (numel,)).requires_grad_() for k in range(3)]
    opt = RMSprop(params, momentum=0.9, centered=True)
    params = opt.param_groups[0]["params"]

    def steps(count):
        for seed in range(count):
            for k, p in enumerate(params):
                p.grad = normal(seed * 10 + k, (numel,))
            written = [
                [p, *(opt.state[p][key] for key in ARRAYS if p in opt.state)]
                for p in params
            ]
            before = [versions(tensors) for tensors in written]
            opt.step()
            for tensors, old in zip(written, before, strict=True):
                assert all(map(int.__lt__, old, versions(tensors)))

    steps(3)
    assert versions(params) == [3, 3, 3]
    edit(opt)
    steps(3)


def test_writing_state_does_not_spoil_a_backward():
    """Whoever resets it between a forward and its backward may."""
    weight = normal(0, (3, 3)).requires_grad_()
    opt = RMSprop([weight], momentum=0.9)
    for seed in range(3):
        weight.grad = normal(seed, (3, 3))
        opt.step()
    out = (weight @ weight).sum()
    for key in ("square_avg", "momentum_buffer"):
        opt.state[weight][key].zero_()
    out.backward()


@pytest.mark.parametrize("key", ["square_avg", "grad_avg", "momentum_buffer"])
def test_a_backward_through_stepped_state_is_refused(key):
    """State is in opt.state for anybody's graph; what the step wrote is noticed there."""
    for cls in CLASSES:
        side = build(cls, momentum=0.9, centered=True)
        side.train([0])
        weight = normal(7, (7, 5)).requires_grad_()
        loss = (weight * side.state()[0][key]).sum()
        side.train([1])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_backward_through_a_stepped_parameter_is_refused(steps):
    """The graph has saved what is no longer there."""
    said = []
    for cls in CLASSES:
        weight = normal(0, (3, 3)).requires_grad_()
        opt = cls([weight])
        for _ in range(steps):
            out = (weight @ weight).sum()
            weight.grad = normal(1, (3, 3))
            opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()
        said.append(weight._version)
    assert said[1] > 0


def test_a_step_without_gradients_writes_nothing():
    for cls in CLASSES:
        side = build(cls)
        side.train([0])
        side.opt.zero_grad()
        before = snapshot(side), [param._version for param in side.params]
        side.opt.step()
        assert (snapshot(side), [param._version for param in side.params]) == before


@form
def test_gradients_are_not_written(form):
    side = build(RMSprop, **form, max_grad_norm=0.1)
    side.set_gradients(0)
    kept = [param.grad for param in side.params]
    before = bits(kept)
    side.opt.step()
    assert all(p.grad is g for p, g in zip(side.params, kept, strict=True))
    assert bits(kept) == before


def test_parameters_stay_leaves():
    side = build(RMSprop, momentum=0.9, centered=True)
    side.train(range(2))
    for param in side.params:
        assert param.is_leaf
        assert param.requires_grad
        assert param.grad_fn is None
    for state in side.state():
        assert not any(value.requires_grad for value in state.values())


# --- modes ------------------------------------------------------------------------------------


class Functions(TorchFunctionMode):
    """Passes every function on, with the extra work that any such mode makes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    """Passes every operator on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


MODES = {
    "enable_grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "inference_mode off": lambda: torch.inference_mode(False),
    "default device": lambda: torch.device("cpu"),
    "another default device": lambda: torch.device("meta"),
    "function mode": Functions,
    "dispatch mode": Dispatches,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "forward AD": torch.autograd.forward_ad.dual_level,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "multithreading off": lambda: torch.autograd.set_multithreading_enabled(False),
}
mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@mode
@form
def test_steps_inside_a_mode(mode, form, recwarn):
    """State that was made outside."""
    sides = both(**form)
    train_both(sides, [0])
    for side in sides:
        side.set_gradients(1)
        with mode():
            enabled = torch.is_grad_enabled()
            side.opt.step()
            assert torch.is_grad_enabled() == enabled
    assert_same(*sides)


@mode
def test_everything_inside_a_mode(mode, recwarn):
    """Parameters, gradients and state too; they have become what torch's have."""
    sides = []
    for cls in CLASSES:
        with mode():
            side = build(cls, momentum=0.9)
            side.train(range(3))
        sides.append(side)
    assert_same(*sides)
    for mine, its in zip(sides[1].params, sides[0].params, strict=True):
        assert mine.is_inference() == its.is_inference()
        assert mine.requires_grad == its.requires_grad


def test_inference_mode_now_and_then():
    """State stays of use: torch's class stops where some of it was made in that mode."""
    for cls in CLASSES:
        side = build(cls)
        side.train([0])
        with torch.inference_mode():
            side.train([1])
        side.train([2])
        assert not any(param.is_inference() for param in side.params)
        assert [int(state["step"]) for state in side.state()] == [3] * 4
    side = build(RMSprop)
    side.set_gradients(0)
    with torch.inference_mode():
        side.opt.step()
    side.train([1])
    other = build(RMSprop)
    other.train([0, 1])
    assert snapshot(side) == snapshot(other)


# --- gradients that autograd made -------------------------------------------------------------


def scalar_loss(params):
    return sum((p**3).sum() + p.sin().sum() for p in params)


@form
@pytest.mark.parametrize("create_graph", [False, True])
def test_training_with_autograd(form, create_graph):
    """Gradients of a graph, which may require gradients themselves."""
    sides = both(lr=1e-3, **form)
    for _ in range(4):
        for side in sides:
            grads = torch.autograd.grad(
                scalar_loss(side.params), side.params, create_graph=create_graph
            )
            for param, grad in zip(side.params, grads, strict=True):
                param.grad = grad
                assert grad.requires_grad == create_graph
            side.opt.step()
            assert not any(param.grad_fn for param in side.params)
    assert_same(*sides)


def test_the_optimizer_inside_the_backward():
    """One optimizer a parameter, stepped as soon as its gradient is there."""
    results = []
    for cls in CLASSES:
        params = parameters(0)
        optimizers = {param: cls([param], lr=0.01) for param in params}

        def step(param, optimizers=optimizers):
            optimizers[param].step()
            optimizers[param].zero_grad()

        for param in params:
            param.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            scalar_loss(params).backward()
            assert all(param.grad is None for param in params)
        assert {float(optimizers[p].state[p]["step"]) for p in params} == {3.0}
        results.append([p.detach() for p in params])
    assert_close(results[1], results[0])


def test_gradients_of_other_threads():
    """A backward in a thread of its own, steps in another."""
    sides = both()

    def work(side):
        for _ in range(3):
            side.opt.zero_grad()
            scalar_loss(side.params).backward()
            side.opt.step()

    for side in sides:
        thread = threading.Thread(target=work, args=[side])
        thread.start()
        thread.join()
    assert_same(*sides)


@pytest.mark.parametrize("shape", [(1,), (1, 1), ()], ids=str)
def test_gradients_with_a_pending_negation(shape):
    """Imaginary parts of conjugates are views that flip the sign when they are read."""
    for dtype in (torch.complex64, torch.complex128):
        sides = []
        for cls in CLASSES:
            params = [normal(0, shape, dtype.to_real()).requires_grad_()]
            side = Side(params, cls(params))
            for seed in range(3):
                number = torch.complex(*[normal((seed, i), shape) for i in (1, 2)])
                grad = number.to(dtype).conj().imag
                assert grad.is_neg()
                params[0].grad = grad
                side.opt.step()
                assert torch.equal(params[0].grad, -number.to(dtype).imag)
            sides.append(side)
        assert_same(*sides)


def test_gradients_of_complex_parts():
    """What autograd itself makes of `torch.complex` of two real parameters."""
    sides = both(shapes=[(1,), (1,)])
    for _ in range(3):
        for side in sides:
            side.opt.zero_grad()
            number = torch.complex(*side.params)
            (number**3).abs().sum().backward()
            side.opt.step()
    assert_same(*sides)


@form
def test_differentiable_steps(form):
    """A step that is differentiated through: the same value and the same gradient."""
    results = []
    for cls in CLASSES:
        lr = torch.tensor(0.1)
        start = normal(0, (4,), torch.float64).requires_grad_()
        grad = normal(1, (4,), torch.float64).requires_grad_()
        param = start.clone()
        opt = cls([param], lr=lr, differentiable=True, **form)
        param.grad = grad
        opt.step()
        results.append(
            [param.detach(), *torch.autograd.grad(param.sum(), [start, grad])]
        )
    assert_close(results[1], results[0])


# --- zero_grad --------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False, None])
@pytest.mark.parametrize("foreach", [None, True])
def test_zero_grad(set_to_none, foreach):
    options = {} if set_to_none is None else {"set_to_none": set_to_none}
    sides = both(foreach=foreach)
    for side in sides:
        side.params[1].grad = None
        side.train([0])
        side.params[2].grad = None
        kept = side.params[0].grad
        side.opt.zero_grad(**options)
        assert (side.params[0].grad is kept) == (set_to_none is False)
        assert side.params[2].grad is None
        if set_to_none is False:
            assert not kept.any()
        side.opt.step()
    assert_same(*sides)


# --- torch.compile ----------------------------------------------------------------------------


quiet = pytest.mark.filterwarnings("ignore")  # of Dynamo, about itself


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="eager")


@quiet
@pytest.mark.parametrize("options", [{}, FORMS["all"]], ids=["plain", "all"])
def test_a_compiled_training_step(options):
    """The graph may break at the step; the numbers are those of eager mode.

    Up to rounding, for gradients are summed in another order there.
    """
    eager, inside = build(RMSprop, **options), build(RMSprop, **options)

    def training_step(side):
        side.opt.zero_grad()
        scalar_loss(side.params).backward()
        side.opt.step()

    def of_inside():
        training_step(inside)

    run = compiled(of_inside)
    for _ in range(3):
        run()
        training_step(eager)
    assert_same(eager, inside)


@quiet
def test_a_compiled_model_and_a_compiled_step():
    """The usual two uses: the model alone, and the step of the optimizer alone."""
    torch.manual_seed(0)
    losses = []
    for compile_model, compile_step in ((False, False), (True, False), (False, True)):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        opt = RMSprop(model.parameters(), lr=1e-2)
        forward = compiled(model) if compile_model else model
        step = compiled(opt.step) if compile_step else opt.step
        for _ in range(3):
            opt.zero_grad()
            loss = (forward(normal(0, (8, 4))) ** 2).mean()
            loss.backward()
            step()
        losses.append(loss.item())
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


@quiet
def test_a_compiled_closure():
    sides = [build(RMSprop), build(RMSprop)]
    for side, wrap in zip(sides, (lambda f: f, compiled), strict=True):

        def closure(side=side):
            side.opt.zero_grad()
            loss = scalar_loss(side.params)
            loss.backward()
            return loss

        def run(side=side, closure=closure):
            return side.opt.step(closure)

        run = wrap(run)
        values = [run().item() for _ in range(3)]
        assert len(set(values)) == 3
    assert_same(*sides)


def test_tensor_subclasses():
    """Parameters of a class of their own, and gradients of one."""

    class Marked(torch.Tensor):
        pass

    sides = []
    for cls in CLASSES:
        params = [normal(0, (4, 3)).as_subclass(Marked).requires_grad_()]
        params.append(torch.nn.Parameter(normal(1)))
        side = Side(params, cls(params, momentum=0.9))
        side.train(range(2))
        params[1].grad = normal(2).as_subclass(Marked)
        side.opt.step()
        sides.append(side)
    assert [type(p) for p in sides[1].params] == [Marked, torch.nn.Parameter]
    assert_same(*sides)
