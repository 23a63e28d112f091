"""Promise: hooks around a step, closures, the profiler's ranges and subclasses behave as with every torch optimizer."""

import contextlib

import pytest
import torch
from rmsprop.torch import RMSprop
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_pairs import (
    CLASSES,
    Side,
    Stock,
    assert_same,
    both,
    build,
    outcome,
    parameters,
    snapshot,
)


@contextlib.contextmanager
def global_hooks(before, after):
    handles = [
        register_optimizer_step_pre_hook(before),
        register_optimizer_step_post_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logger(log, name):
    return lambda opt, args, kwargs: log.append((name, args[1:], sorted(kwargs)))


def loss():
    return torch.tensor(3.0)


CALLS = {
    "plain": lambda opt: opt.step(),
    "none": lambda opt: opt.step(None),
    "closure": lambda opt: opt.step(loss),
    "keyword": lambda opt: opt.step(closure=loss),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_hooks_see_what_torchs_do(call):
    """In torch's order, with the optimizer first among the arguments."""
    logs = []
    for cls in CLASSES:
        side = build(cls)
        side.set_gradients(0)
        log = []
        for name in ("first", "second"):
            side.opt.register_step_pre_hook(logger(log, f"{name} before"))
            side.opt.register_step_post_hook(logger(log, f"{name} after"))
        same = lambda o, args, kwargs, log=log: log.append(o is args[0])
        side.opt.register_step_pre_hook(same)
        with global_hooks(logger(log, "global before"), logger(log, "global after")):
            call(side.opt)
        logs.append(log)
    assert logs[1] == logs[0]
    assert len(logs[0]) == 7


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_a_step_returns(call):
    for with_hook in (False, True):
        results = []
        for cls in CLASSES:
            side = build(cls)
            side.set_gradients(0)
            if with_hook:
                side.opt.register_step_pre_hook(lambda *_: None)
            results.append(call(side.opt))
        assert results[1] == results[0]


def test_hooks_run_before_and_after_the_update():
    side = build(RMSprop)
    side.set_gradients(0)
    seen = []
    watch = lambda o, args, kwargs: seen.append(snapshot(side))
    side.opt.register_step_pre_hook(watch)
    side.opt.register_step_post_hook(watch)
    start = snapshot(side)
    side.opt.step()
    assert seen == [start, snapshot(side)]
    assert start != snapshot(side)


def test_removed_hooks_are_silent():
    for cls in CLASSES:
        side = build(cls)
        fail = lambda *_: pytest.fail("called")
        handles = [
            side.opt.register_step_pre_hook(fail),
            side.opt.register_step_post_hook(fail),
        ]
        for handle in handles:
            handle.remove()
        side.train([0])


def test_a_hook_may_change_the_arguments():
    """The closure, or the gradients behind the step's back."""
    results = []
    for cls in CLASSES:
        side = build(cls)
        side.set_gradients(0)

        def replace(opt, args, kwargs):
            return (args[0], loss), {}

        def double(opt, args, kwargs):
            for group in opt.param_groups:
                for param in group["params"]:
                    param.grad.mul_(2)

        side.opt.register_step_pre_hook(replace)
        side.opt.register_step_pre_hook(double)
        assert side.opt.step() == 3
        results.append(side)
    assert_same(*results)


@pytest.mark.parametrize("result", [3, (1,), "ab", [(), {}]], ids=repr)
def test_a_hook_that_returns_something_else_is_refused(result):
    """The text names a function, so only its end is torch's."""
    said = []
    for cls in CLASSES:
        side = build(cls)
        side.set_gradients(0)
        before = snapshot(side)
        side.opt.register_step_pre_hook(lambda *_: result)
        ((kind, text),) = outcome(side.opt.step)
        said.append((kind, text[text.index("must return") :]))
        assert snapshot(side) == before
    assert said[0] == said[1]


class Stop(Exception):
    """Raised by the hooks and closures below."""


def stop(*_):
    raise Stop


@pytest.mark.parametrize("where", ["before", "after", "closure"])
def test_exceptions_pass_through(where):
    """What has been done stays done, and the next step works."""
    results = []
    for cls in CLASSES:
        side = build(cls)
        side.set_gradients(0)
        before = snapshot(side)
        handle = None
        if where == "before":
            handle = side.opt.register_step_pre_hook(stop)
        if where == "after":
            handle = side.opt.register_step_post_hook(stop)
        with pytest.raises(Stop):
            side.opt.step(stop if where == "closure" else None)
        assert (snapshot(side) == before) == (where != "after")
        assert torch.is_grad_enabled()
        if handle is not None:
            handle.remove()
        side.train([1])
        results.append(side)
    assert_same(*results)


# --- closures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("keyword", [False, True])
def test_closures_run_with_gradients_on(mode, keyword):
    """Whatever the caller's mode, which holds again afterwards; once for a step."""
    results = []
    for cls in CLASSES:
        side = build(cls)
        calls = []

        def closure(side=side, calls=calls):
            calls.append(torch.is_grad_enabled())
            side.opt.zero_grad()
            total = sum((p**2).sum() for p in side.params)
            total.backward()
            return total

        for _ in range(3):
            with mode():
                enabled = torch.is_grad_enabled()
                value = (
                    side.opt.step(closure=closure)
                    if keyword
                    else side.opt.step(closure)
                )
                assert torch.is_grad_enabled() == enabled
        assert calls == [True] * 3
        assert value.requires_grad
        results.append(side)
    assert_same(*results)


@pytest.mark.parametrize("closure", [3, "loss", loss()], ids=["int", "str", "tensor"])
def test_closures_that_cannot_be_called_are_refused(closure):
    said = [outcome(build(cls).opt.step, closure) for cls in CLASSES]
    assert said[0] == said[1]
    assert said[0][0][0] is TypeError


def test_arguments_that_a_step_does_not_have():
    for call in (lambda o: o.step(None, None), lambda o: o.step(grads=[])):
        for cls in CLASSES:
            with pytest.raises(TypeError):
                call(build(cls).opt)


# --- the profiler -----------------------------------------------------------------------------


def ranges(run):
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        run()
    return [e.name for e in profile.events() if e.name.startswith("Optimizer.")]


def test_ranges_of_the_profiler():
    class Child(RMSprop):
        pass

    for cls in (Stock, RMSprop, Child):
        side = build(cls)
        side.train([0])

        def run(side=side):
            side.opt.step()
            side.opt.zero_grad()

        name = cls.__name__
        assert ranges(run) == [
            f"Optimizer.step#{name}.step",
            f"Optimizer.zero_grad#{name}.zero_grad",
        ]


def test_ranges_of_the_older_profiler():
    for cls in CLASSES:
        side = build(cls)
        side.set_gradients(0)
        with torch.autograd.profiler.profile() as profile:
            side.opt.step()
        names = [event.name for event in profile.function_events]
        assert names.count("Optimizer.step#RMSprop.step") == 1


def test_a_step_inside_the_profiler_is_the_same_step():
    sides = [build(RMSprop, momentum=0.9) for _ in range(2)]
    for seed in range(2):
        for side in sides:
            side.set_gradients(seed)
        sides[0].opt.step()
        ranges(sides[1].opt.step)
    assert snapshot(sides[0]) == snapshot(sides[1])


# --- subclasses and patches -------------------------------------------------------------------


def test_a_subclass_that_overrides_step():
    """Its own step is the one that runs, hooks around it, and it may call ours."""
    for base in CLASSES:

        class Halving(base):
            def step(self, closure=None):
                for group in self.param_groups:
                    for param in group["params"]:
                        param.grad = param.grad / 2
                return super().step(closure)

        side = build(Halving)
        seen = []
        side.opt.register_step_pre_hook(
            lambda o, a, k, side=side, seen=seen: seen.append(side.params[0].grad)
        )
        side.set_gradients(0)
        whole = side.params[0].grad
        assert side.opt.step(loss) == 3
        assert seen[0] is whole
        assert torch.equal(side.params[0].grad, whole / 2)
        assert side.state()[0]["step"] == 1


def test_a_subclass_with_its_own_arguments():
    class Patient(RMSprop):
        def __init__(self, params, every=1, **options):
            super().__init__(params, **options)
            self.every, self.count = every, 0

        def step(self, closure=None):
            self.count += 1
            return super().step(closure) if self.count % self.every == 0 else None

    params = parameters(0)
    side = Side(params, Patient(params, every=2, lr=0.1))
    side.train(range(4))
    assert [int(state["step"]) for state in side.state()] == [2] * 4


def test_step_can_be_replaced_on_an_instance():
    """As schedulers and trainers do, to count steps or to wrap them."""
    for cls in CLASSES:
        side = build(cls)
        inner, calls = side.opt.step, []

        def counted(*args, inner=inner, calls=calls, **kwargs):
            calls.append(1)
            return inner(*args, **kwargs)

        side.opt.step = counted
        side.train(range(3))
        assert len(calls) == 3
        assert side.state()[0]["step"] == 3


def test_both_classes_in_one_program():
    """Making one does not change the hooks of the other, nor of other optimizers."""
    sides = both()
    log = []
    with global_hooks(logger(log, "before"), logger(log, "after")):
        for side in sides:
            side.train([0])
        other = torch.optim.SGD(parameters(0), lr=0.1)
        other.step()
    assert [name for name, *_ in log] == ["before", "after"] * 3


def test_a_step_that_calls_ours_sees_hooks_once(run_python):
    """In an interpreter of its own: torch wraps a class once and for all."""
    code = """
import torch
from rmsprop.torch import RMSprop

class Own(RMSprop):
    def step(self, closure=None):
        return super().step(closure)

param = torch.ones(2, requires_grad=True)
opt = Own([param])
calls = []
opt.register_step_pre_hook(lambda *_: calls.append("before"))
opt.register_step_post_hook(lambda *_: calls.append("after"))
param.grad = torch.ones(2)
opt.step()
print(*calls, opt.state[param]["step"].item())
"""
    assert run_python(code).split() == ["before", "after", "1.0"]


def test_a_subclass_that_calls_the_base_class_itself():
    class Own(RMSprop):
        def __init__(self, params, lr):
            defaults = Stock([torch.ones(1)], lr=lr).defaults
            torch.optim.Optimizer.__init__(self, params, defaults)

    results = []
    for make in (Stock, Own):
        param = torch.ones(3, requires_grad=True)
        opt = make([param], lr=0.1)
        param.grad = torch.arange(3.0)
        opt.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)
