"""Promise: step_in_backward steps each parameter as its gradient completes, and the numbers are those of a step after the backward."""

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from rmsprop.torch import RMSprop
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch_pairs import (
    CLASSES,
    FORMS,
    OWN,
    Side,
    Stock,
    assert_close,
    build,
    normal,
    outcome,
    parameters,
    snapshot,
)

# Most loops here have no step besides.
SECOND = "step_in_backward. expected step.. or zero_grad.. between two backwards"
pytestmark = pytest.mark.filterwarnings(f"ignore:{SECOND}")

form = pytest.mark.parametrize("form", [*FORMS.values(), OWN], ids=[*FORMS, "own"])


class Net(nn.Module):
    """A tied weight, an embedding, a scalar, and a parameter without a gradient."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 5)
        self.inner = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.unused = nn.Parameter(torch.ones(3))
        self.to(dtype)

    def forward(self, indices):
        x = self.embedding(indices)
        x = torch.tanh(self.inner(x)) @ self.inner.weight * self.scale
        return x @ self.embedding.weight.t()

    def loss(self, seed=0):
        torch.manual_seed(seed)
        indices = torch.randint(7, (11,))
        return nn.functional.cross_entropy(self(indices), indices.flip(0))


def train(opt, net, seeds=range(3)):
    """A step at each seed, whichever way it is done."""
    for seed in seeds:
        net.loss(seed).backward()
        opt.step()
        opt.zero_grad()


def side_of(net, opt):
    return Side(list(net.parameters()), opt)


def both_ways(make=Net, **options):
    """Equal models: one is stepped after the backward, the other one in it."""
    sides = []
    for in_backward in (False, True):
        net = make()
        opt = RMSprop(net.parameters(), **options)
        if in_backward:
            opt.step_in_backward()
        sides.append((opt, net))
    return sides


def assert_same_bits(after, inside):
    """Whatever the order in which state was created."""
    assert snapshot(side_of(after[1], after[0])) == snapshot(
        side_of(inside[1], inside[0])
    )


def square(p):
    return p.square().sum()


# --- the numbers ------------------------------------------------------------------------------


@form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_of_a_step_after_the_backward(form, dtype):
    after, inside = both_ways(lambda: Net(dtype), lr=0.01, **form)
    for seed in range(4):
        train(*after, [seed])
        inside[1].loss(seed).backward()
        assert_same_bits(after, inside)


def test_the_bits_of_a_long_step_on_two_threads():
    """Long enough to give the GIL away and to be shared."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(700, 900), nn.Linear(900, 3))

    sides = both_ways(make, threads=2)
    for opt, net in sides:
        for seed in range(3):
            net(normal(seed, (2, 700))).square().sum().backward()
            opt.step()
            opt.zero_grad()
    assert_same_bits(*sides)


def test_options_count_as_they_are_at_each_step():
    sides = both_ways(lr=0.01)
    for opt, net in sides:
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        for seed in range(3):
            train(opt, net, [seed])
            schedule.step()
        opt.param_groups[0].update(momentum=0.9, weight_decay=0.1)
        train(opt, net)
        assert schedule.get_last_lr() == [0.01 / 8]
    assert_same_bits(*sides)


def test_groups_have_their_own_options():
    sides = []
    for in_backward in (False, True):
        net = Net()
        groups = [
            {"params": [p], "lr": 0.1 / i} for i, p in enumerate(net.parameters(), 1)
        ]
        opt = RMSprop(groups, momentum=0.9)
        if in_backward:
            opt.step_in_backward()
        train(opt, net)
        opt.param_groups[2]["momentum"] = 0
        train(opt, net)
        sides.append((opt, net))
    assert_same_bits(*sides)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "negated", "scalar"])
def test_gradients_of_every_layout(kind):
    """As autograd hands them over: it does not copy those that nobody else has."""
    results = []
    for in_backward in (False, True):
        side = build(RMSprop, shapes=[() if kind == "scalar" else (3, 4)], momentum=0.9)
        if in_backward:
            side.opt.step_in_backward()
        (p,) = side.params
        for seed in range(3):
            if kind == "expanded":
                (p * 2).sum().backward()
            elif kind == "transposed":
                (p.t() @ normal(seed, (3, 2))).square().sum().backward()
            elif kind == "negated":
                z = torch.complex(normal(seed, p.shape), p * 2)
                z.conj().imag.sum().backward()
            else:
                (p * 3 + 1).square().backward()
            side.opt.step()
            side.opt.zero_grad()
        results.append(snapshot(side))
    assert results[0] == results[1]


def test_a_closure_may_do_the_backward():
    sides = both_ways()
    for opt, net in sides:

        def closure(opt=opt, net=net):
            opt.zero_grad()
            loss = net.loss()
            loss.backward()
            return loss

        for _ in range(3):
            opt.step(closure)
    assert_same_bits(*sides)


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph")
def test_gradients_that_have_a_graph():
    sides = both_ways()
    for opt, net in sides:
        for seed in range(3):
            net.loss(seed).backward(create_graph=True)
            opt.step()
            opt.zero_grad()
        assert not any(p.grad_fn for p in net.parameters())
    assert_same_bits(*sides)


def test_backwards_of_other_threads():
    """Of disjoint parts of one optimizer's parameters at once."""
    results = []
    for at_once in (False, True):
        params = parameters(0, [(300, 300)] * 4)
        opt = RMSprop(params)
        opt.step_in_backward()

        def work(p):
            for _ in range(20):
                (p**3).sum().backward()

        threads = [threading.Thread(target=work, args=(p,)) for p in params]
        for thread in threads:
            thread.start()
            if not at_once:
                thread.join()
        for thread in threads:
            thread.join()
        results.append(snapshot(Side(params, opt)))
    assert results[0] == results[1]


# --- when it steps ----------------------------------------------------------------------------


def test_gradients_are_never_there_all_at_once():
    net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(6)])
    params = list(net.parameters())
    seen = []
    for p in params:  # before ours, which come in this order
        p.register_post_accumulate_grad_hook(
            lambda _: seen.append([p.grad is not None for p in params])
        )
    opt = RMSprop(params)
    opt.step_in_backward()
    net(torch.ones(2, 4)).sum().backward()
    assert [sum(there) for there in seen] == [1] * 6
    assert all(p.grad is None for p in params)
    assert all(opt.state[p]["step"] == 1 for p in params)


def test_a_parameter_used_twice_is_stepped_once():
    """When the sum of its gradients is complete."""
    (opt, net), _ = both_ways()
    opt.step_in_backward()
    train(opt, net)
    assert {int(state["step"]) for state in opt.state.values()} == {3}


def test_every_backward_is_a_step():
    (p,) = parameters(0, [(3,)])
    opt = RMSprop([p])
    opt.step_in_backward()
    for _ in range(3):
        square(p).backward()
    assert opt.state[p]["step"] == 3


def test_step_steps_what_else_has_a_gradient():
    net = Net()
    opt = RMSprop(net.parameters())
    opt.step_in_backward()
    net.loss().backward()
    net.unused.grad = torch.ones(3)
    opt.step()
    assert {int(state["step"]) for state in opt.state.values()} == {1}
    assert net.unused in opt.state


def test_gradients_that_autograd_does_not_keep_are_no_steps():
    net = Net()
    opt = RMSprop(net.parameters())
    opt.step_in_backward()
    torch.autograd.grad(net.loss(), net.inner.weight)
    assert not opt.state


def test_an_earlier_hook_may_take_the_gradient_away():
    (p,) = parameters(0, [(3,)])
    p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    opt = RMSprop([p])
    opt.step_in_backward()
    square(p).backward()
    assert not opt.state


# --- the handle -------------------------------------------------------------------------------


@pytest.mark.parametrize("by_block", [False, True])
def test_the_handle_ends_it(by_block):
    (p,) = parameters(0, [(3,)])
    opt = RMSprop([p])
    if by_block:
        with opt.step_in_backward() as handle:
            square(p).backward()
    else:
        handle = opt.step_in_backward()
        square(p).backward()
        handle.remove()
    handle.remove()
    square(p).backward()
    assert opt.state[p]["step"] == 1
    assert p.grad is not None
    opt.step()
    assert opt.state[p]["step"] == 2


def test_it_is_on_once():
    (p,) = parameters(0, [(3,)])
    opt = RMSprop([p])
    old = opt.step_in_backward()
    with pytest.raises(ValueError, match="step_in_backward: expected it to be off"):
        opt.step_in_backward()
    square(p).backward()
    assert opt.state[p]["step"] == 1
    old.remove()
    opt.step_in_backward()
    old.remove()  # not the new one
    square(p).backward()
    assert opt.state[p]["step"] == 2


def test_a_hook_may_remove_the_handle():
    params = parameters(0)
    opt = RMSprop(params)
    params[0].register_post_accumulate_grad_hook(lambda _: handle.remove())
    handle = opt.step_in_backward()
    for _ in range(2):
        sum(map(square, params)).backward()
    assert all(state["step"] <= 1 for state in opt.state.values())
    assert params[0].grad is not None


def test_nothing_is_left_where_it_cannot_begin():
    """torch has no such hooks for a tensor that is no leaf."""
    leaf, base = parameters(0, [(3,), (3,)])
    result = base * 2
    result.retain_grad()
    opt = RMSprop([{"params": [leaf]}, {"params": [result]}])
    with pytest.raises(RuntimeError, match="non-leaf"):
        opt.step_in_backward()
    square(leaf).backward()
    assert leaf.grad is not None
    opt.max_grad_norm = 1.0


# --- options ----------------------------------------------------------------------------------

ALL_AT_ONCE = pytest.mark.parametrize(
    ("option", "value"),
    [("max_grad_norm", 40.0), ("nonfinite", "skip"), ("nonfinite", "raise")],
)


@ALL_AT_ONCE
def test_options_that_need_all_gradients(option, value):
    (p,) = parameters(0, [(3,)])
    opt = RMSprop([p], **{option: value})
    with pytest.raises(ValueError, match=f"^{option}: .* got {value!r}"):
        opt.step_in_backward()
    square(p).backward()
    assert p.grad is not None


@ALL_AT_ONCE
def test_options_that_need_all_gradients_later(option, value):
    """Refused where they are set, and nothing has changed."""
    (p,) = parameters(0, [(3,)])
    opt = RMSprop([p])
    off = getattr(opt, option)
    handle = opt.step_in_backward()
    with pytest.raises(ValueError, match=f"^{option}: .* got {value!r}"):
        setattr(opt, option, value)
    setattr(opt, option, off)
    square(p).backward()
    assert opt.state[p]["step"] == 1
    handle.remove()
    setattr(opt, option, value)
    assert getattr(opt, option) == value


@pytest.mark.parametrize(
    "wrong", [{"eps_in_sqrt": "x"}, {"lr": "x"}, {"initial_square_avg": -1.0}], ids=str
)
@pytest.mark.parametrize("stepped", [False, True])
def test_bad_options_are_refused_in_the_words_of_step(wrong, stepped):
    said = []
    for in_backward in (False, True):
        side = build(RMSprop, shapes=[(3,)])
        (p,) = side.params
        if stepped:
            side.train([0])
        side.opt.zero_grad()
        side.opt.param_groups[0].update(wrong)
        before = snapshot(side)
        if in_backward:
            side.opt.step_in_backward()
            said.append(outcome(square(p).backward))
            assert p.grad is not None
        else:
            square(p).backward()
            said.append(outcome(side.opt.step))
        assert snapshot(side) == before
    assert said[0] == said[1] != []


# --- parameters that come and go --------------------------------------------------------------


def test_groups_added_later():
    old, new = parameters(0, [(3,), (4,)])
    opt = RMSprop([old])
    handle = opt.step_in_backward()
    opt.add_param_group({"params": [new], "lr": 0.5})
    (square(old) + square(new)).backward()
    assert old.grad is new.grad is None
    assert [int(opt.state[p]["step"]) for p in (old, new)] == [1, 1]
    handle.remove()
    square(new).backward()
    assert new.grad is not None


def test_a_group_that_is_refused_gets_no_hooks():
    old, new, base = parameters(0, [(3,), (3,), (3,)])
    result = base * 2
    result.retain_grad()
    opt = RMSprop([old])
    opt.step_in_backward()
    with pytest.raises(RuntimeError, match="non-leaf"):
        opt.add_param_group({"params": [new, result]})
    with pytest.raises(TypeError, match="eps_in_sqrt"):
        opt.add_param_group({"params": [new], "eps_in_sqrt": "x"})
    assert len(opt.param_groups) == 1
    (square(old) + square(new)).backward()
    assert list(opt.state) == [old]
    assert new.grad is not None


def test_frozen_parameters_stay_frozen_until_they_are_trained():
    params = parameters(0, [(3,), (3,)])
    params[1].requires_grad_(False)
    opt = RMSprop(params)
    handle = opt.step_in_backward()
    sum(map(square, params)).backward()
    assert list(opt.state) == [params[0]]
    assert not params[1].requires_grad
    params[1].requires_grad_(True)
    sum(map(square, params)).backward()
    assert [int(opt.state[p]["step"]) for p in params] == [2, 1]
    handle.remove()


def reorder(opt):
    opt.param_groups[0]["params"].reverse()


def split(opt):
    group = opt.param_groups[0]
    moved = [group["params"].pop() for _ in range(2)]
    opt.param_groups.insert(0, {**group, "params": moved, "lr": 0.5})


def replace_the_groups(opt):
    opt.param_groups = [dict(g, lr=0.2) for g in opt.param_groups]


def reload(opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def clear_state(opt):
    opt.state.clear()


@pytest.mark.parametrize(
    "edit", [reorder, split, replace_the_groups, reload, clear_state]
)
def test_edits_between_backwards(edit):
    sides = both_ways(momentum=0.9)
    for opt, net in sides:
        train(opt, net)
        edit(opt)
        train(opt, net)
        edit(opt)
        train(opt, net)
    assert_same_bits(*sides)


def test_a_parameter_that_left_its_group_is_left_alone():
    params = parameters(0, [(3,), (4,)])
    opt = RMSprop(params)
    opt.step_in_backward()
    opt.param_groups[0]["params"].pop()
    sum(map(square, params)).backward()
    assert list(opt.state) == [params[0]]
    assert params[1].grad is not None


# --- what is not ordinary ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_tensors(dtype):
    results = []
    for cls in CLASSES:
        first = normal(0, (4,)).requires_grad_()
        second = normal(1, (4,)).to(dtype).requires_grad_()
        opt = cls([first, second], momentum=0.9)
        if cls is RMSprop:
            opt.step_in_backward()
        for _ in range(3):
            (first * second.abs().float()).sum().backward()
            opt.step()
            opt.zero_grad()
        results.append([first.detach(), second.detach()])
    assert_close(results[1], results[0], rounded_as=torch.float32)


def test_sparse_gradients_that_are_refused_as_by_step():
    weight = torch.ones(5, 3, requires_grad=True)
    opt = RMSprop([weight], capturable=True)
    opt.step_in_backward()
    loss = nn.functional.embedding(torch.tensor([1]), weight, sparse=True).sum()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        loss.backward()
    assert not opt.state
    assert bool((weight == 1).all())


class Tagged(torch.Tensor):
    """A subclass that torch functions keep."""


def test_what_fails_keeps_its_gradient_and_the_rest_works_on():
    """Options that torch's own rmsprop lacks, and a tensor that only it takes."""
    ordinary = normal(0, (4,)).requires_grad_()
    odd = normal(1, (4,)).as_subclass(Tagged).requires_grad_()
    opt = RMSprop([ordinary, odd])
    opt.param_groups[0]["eps_in_sqrt"] = True
    opt.step_in_backward()
    with pytest.raises(ValueError, match=r"^eps_in_sqrt: .* got parameter 1 with"):
        square(odd).backward()
    assert odd.grad is not None
    assert not opt.state
    square(ordinary).backward()
    assert list(opt.state) == [ordinary]


def test_under_a_dispatch_mode():
    """torch's own rmsprop does the work there."""

    class Listener(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.heard = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.heard.append(str(func))
            return func(*args, **(kwargs or {}))

    side = build(RMSprop, shapes=[(3,)])
    side.opt.step_in_backward()
    (p,) = side.params
    with Listener() as listener:
        square(p).backward()
    assert any("addcdiv" in name for name in listener.heard)
    assert side.opt.state[p]["step"] == 1
    assert p.grad is None


def test_the_old_value_is_not_there_for_the_rest_of_the_backward():
    """torch raises, as for a hook of its own optimizer, instead of a wrong gradient."""

    def backward(p):
        x = torch.ones(2, 3, requires_grad=True)
        (torch.tanh(x @ p.detach()) @ p).sum().backward()

    for stepped in (False, True):
        (p,) = parameters(0, [(3, 3)])
        opt = Stock([p])
        p.register_post_accumulate_grad_hook(lambda _, opt=opt: opt.step())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward(p)

        (p,) = parameters(0, [(3, 3)])
        opt = RMSprop([p])
        if stepped:  # the first step is another path
            square(p).backward()
            opt.step()
            opt.zero_grad()
        opt.step_in_backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward(p)


def test_gradients_of_inputs_are_those_of_the_old_values():
    """What a node needs it has used when the gradient of its parameter is complete."""
    grads = []
    for in_backward in (False, True):
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        net.load_state_dict(
            {k: normal(0, v.shape) for k, v in net.state_dict().items()}
        )
        opt = RMSprop(net.parameters(), lr=0.5)
        if in_backward:
            opt.step_in_backward()
        x = normal(1, (3, 4)).requires_grad_()
        net(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


# --- copies, garbage --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_are_off(copied):
    net = Net()
    opt = RMSprop(net.parameters(), momentum=0.9)
    handle = opt.step_in_backward()
    train(opt, net)
    other_net, other = copied((net, opt))
    assert_same_bits((opt, net), (other, other_net))
    other_net.loss().backward()
    assert other_net.inner.weight.grad is not None
    other.step()
    other.zero_grad()
    train(opt, net, [0])
    assert_same_bits((opt, net), (other, other_net))
    other.step_in_backward()
    handle.remove()
    train(other, other_net)
    train(opt, net)
    assert_same_bits((opt, net), (other, other_net))


def test_checkpoints_go_both_ways():
    (after, net), (inside, other) = both_ways(momentum=0.9)
    train(after, net)
    inside.load_state_dict(copy.deepcopy(after.state_dict()))
    other.load_state_dict(net.state_dict())
    train(inside, other)
    after.load_state_dict(copy.deepcopy(inside.state_dict()))
    net.load_state_dict(other.state_dict())
    train(after, net)
    train(inside, other)
    assert_same_bits((after, net), (inside, other))


@pytest.mark.parametrize("keep_handle", [False, True])
def test_hooks_keep_nothing_alive(keep_handle):
    """Neither the optimizer, nor the parameters once it is gone."""
    net = Net()
    opt = RMSprop(net.parameters())
    handle = opt.step_in_backward()
    if not keep_handle:
        del handle
    train(opt, net)
    optimizer, state = weakref.ref(opt), weakref.ref(opt.state[net.scale]["step"])
    del opt
    gc.collect()
    assert optimizer() is None
    assert state() is None
    net.loss().backward()  # the hooks that are left do nothing
    assert net.scale.grad is not None
    if keep_handle:
        handle.remove()
    weight = weakref.ref(net.inner.weight)
    del net
    gc.collect()
    assert weight() is None


# --- with other parts of torch ----------------------------------------------------------------


def test_schedulers_do_not_warn():
    (p,) = parameters(0, [(3,)])
    opt = RMSprop([p], lr=0.1)
    opt.step_in_backward()
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        square(p).backward()
        opt.step()
        schedule.step()


def test_a_compiled_model():
    sides = both_ways()
    for opt, net in sides:
        net.compile(backend="aot_eager")
        train(opt, net)
    assert_same_bits(*sides)


def test_a_grad_scaler_finds_no_gradients():
    """Not supported, and it says so: its step has nothing to look at."""
    (p,) = parameters(0, [(3,)])
    opt = RMSprop([p])
    opt.step_in_backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(square(p)).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(opt)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_torchs_own_way(momentum):
    """`_apply_optimizer_in_backward` makes one optimizer for each parameter."""
    results = []
    for cls in CLASSES:
        net = Net()
        _apply_optimizer_in_backward(
            cls, net.parameters(), {"lr": 0.01, "momentum": momentum}
        )
        for seed in range(3):
            net.loss(seed).backward()
            assert net.inner.weight.grad is None
        results.append([p.detach() for p in net.parameters()])
    assert_close(results[1], results[0])


def test_a_second_backward_without_a_step_warns_once():
    """Adding up gradients, or clipping them, would do nothing of the kind."""
    net = nn.Linear(3, 2)
    opt = RMSprop(net.parameters(), lr=0.01)

    def backward():
        net(torch.ones(3)).sum().backward()

    with opt.step_in_backward(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for between in (opt.step, opt.zero_grad, opt.step):
            backward()
            between()
        backward()
    with opt.step_in_backward(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            backward()
    (only,) = caught
    assert "between two backwards" in str(only.message)
    assert opt.state[net.weight]["step"] == 7
