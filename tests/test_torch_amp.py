"""Promise: `torch.amp.GradScaler` scales, unscales and skips with `rmsprop.torch.RMSprop` as with torch's own class."""

import pytest
import torch
from rmsprop.torch import RMSprop
from torch_pairs import (
    CLASSES,
    FORMS,
    Side,
    Stock,
    assert_same,
    bits,
    both,
    build,
    normal,
    outcome,
    snapshot,
)


def scaler(**options):
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, **options)


def backward(side, scaler, seed, inf=False):
    """Gradients as a scaled loss leaves them, one of them infinite if so wished."""
    side.opt.zero_grad()
    terms = [
        (param * normal((seed, index), param.shape, param.dtype)).sum()
        for index, param in enumerate(side.params)
    ]
    loss = sum(terms)
    if inf:
        loss = loss + side.params[1][2] * float("inf")
    scaler.scale(loss).backward()


def grads(side):
    return bits([param.grad for param in side.params])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("foreach", [None, True])
def test_side_by_side(form, foreach):
    """Overflow in two of ten steps: the same scales, counts and steps."""
    sides = both(foreach=foreach, **form)
    scalers = [scaler(), scaler()]
    for seed in range(10):
        for side, its in zip(sides, scalers, strict=True):
            backward(side, its, seed, inf=seed in (3, 7))
            its.step(side.opt)
            its.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert [int(state["step"]) for state in sides[1].state()] == [8] * 4
    assert_same(*sides)


@pytest.mark.parametrize("inf", [False, True], ids=["step", "overflow"])
def test_gradients_are_left_unscaled(inf):
    """For whoever reads them after the step, the very bits that torch leaves."""
    sides = both()
    for side in sides:
        its = scaler()
        backward(side, its, 0, inf)
        its.step(side.opt)
    assert grads(sides[0]) == grads(sides[1])


def test_an_overflow_is_no_step():
    """Hooks are not called: what counts steps there must not count this one."""
    for cls in CLASSES:
        side = build(cls)
        calls = []
        side.opt.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        side.opt.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        its = scaler()
        for seed in range(3):
            backward(side, its, seed, inf=seed == 1)
            its.step(side.opt)
            its.update()
        assert calls == ["before", "after"] * 2


def test_an_overflow_changes_no_bit():
    side = build(RMSprop, momentum=0.9)
    side.train(range(2))
    before = snapshot(side)
    its = scaler()
    backward(side, its, 2, inf=True)
    assert its.step(side.opt) is None
    its.update()
    assert snapshot(side) == before
    assert its.get_scale() == 2.0**9


def test_an_overflow_in_the_first_step_creates_no_state():
    for cls in CLASSES:
        side = build(cls)
        its = scaler()
        backward(side, its, 0, inf=True)
        its.step(side.opt)
        its.update()
        assert len(side.opt.state) == 0


def test_unscaled_and_clipped_before_the_step():
    sides = both()
    scalers = [scaler(), scaler()]
    for seed in range(6):
        for side, its in zip(sides, scalers, strict=True):
            backward(side, its, seed, inf=seed == 2)
            its.unscale_(side.opt)
            torch.nn.utils.clip_grad_norm_(side.params, 0.5)
            its.step(side.opt)
            its.update()
        assert grads(sides[0]) == grads(sides[1])
    assert_same(*sides)


def test_the_norm_is_that_of_unscaled_gradients():
    """`max_grad_norm` under a scaler is `unscale_` and `clip_grad_norm_`."""
    stock, ours = build(Stock), build(RMSprop, max_grad_norm=0.5)
    scalers = [scaler(), scaler()]
    for seed in range(4):
        backward(stock, scalers[0], seed)
        scalers[0].unscale_(stock.opt)
        norm = torch.nn.utils.clip_grad_norm_(stock.params, 0.5)
        backward(ours, scalers[1], seed)
        for side, its in zip((stock, ours), scalers, strict=True):
            its.step(side.opt)
            its.update()
        assert ours.opt.last_grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert_same(stock, ours)


def test_accumulated_gradients_stay_unscaled():
    """A loop that does not clear them sees what torch leaves there."""
    sides = both()
    scalers = [scaler(), scaler()]
    for side, its in zip(sides, scalers, strict=True):
        backward(side, its, 0)
        its.step(side.opt)
        its.update()
        side.opt.step()  # once more with what is there
    assert grads(sides[0]) == grads(sides[1])
    assert_same(*sides)


def test_two_optimizers_under_one_scaler():
    """One of them overflows: only its step is left out."""
    results = []
    for cls in CLASSES:
        its = scaler()
        good, bad = build(cls, seed=1), build(cls, seed=2)
        backward(good, its, 0)
        backward(bad, its, 0, inf=True)
        for side in (good, bad):
            its.step(side.opt)
        its.update()
        assert its.get_scale() == 2.0**9
        assert [len(side.opt.state) for side in (good, bad)] == [4, 0]
        results.append(Side(good.params + bad.params, good.opt))
    assert_same(*results)


def test_a_gradient_that_is_missing():
    sides = both()
    for side in sides:
        its = scaler()
        backward(side, its, 0)
        side.params[2].grad = None
        its.step(side.opt)
        its.update()
    assert_same(*sides)
    assert len(sides[1].opt.state) == 3


def unscaled_twice(side, its):
    its.unscale_(side.opt)
    its.unscale_(side.opt)


def unscaled_late(side, its):
    its.step(side.opt)
    its.unscale_(side.opt)


def stepped_twice(side, its):
    its.step(side.opt)
    its.step(side.opt)


def closure(side, its):
    its.step(side.opt, closure=lambda: 1)


def no_gradients(side, its):
    side.opt.zero_grad()
    its.step(side.opt)


@pytest.mark.parametrize(
    "misuse", [unscaled_twice, unscaled_late, stepped_twice, closure, no_gradients]
)
def test_misuse_is_refused_in_the_same_words(misuse):
    said = []
    for cls in CLASSES:
        side = build(cls)
        its = scaler()
        backward(side, its, 0)
        said.append(outcome(misuse, side, its))
    assert said[0], "torch accepts this"
    assert said[1] == said[0]


def test_nothing_of_the_scaler_stays_on_the_optimizer():
    for inf in (False, True):
        side = build(RMSprop)
        attributes = set(vars(side.opt))
        its = scaler()
        backward(side, its, 0, inf)
        its.step(side.opt)
        assert not {"grad_scale", "found_inf"} & (set(vars(side.opt)) - attributes)
        side.train([1])
        assert side.state()[0]["step"] == (1 if inf else 2)


def test_a_scaler_that_is_off():
    sides = both()
    for side in sides:
        its = torch.amp.GradScaler("cpu", enabled=False)
        backward(side, its, 0)
        its.step(side.opt)
        its.step(side.opt)
        its.update()
    assert_same(*sides)


def test_skipping_by_the_optimizer_and_by_the_scaler():
    """Together they skip a step once, and the scale still falls."""
    side = build(RMSprop, nonfinite="skip")
    its = scaler()
    for seed in range(4):
        backward(side, its, seed, inf=seed == 1)
        its.step(side.opt)
        its.update()
    assert its.get_scale() == 2.0**9
    assert [int(state["step"]) for state in side.state()] == [3] * 4


def test_autocast_training():
    """Forward in bfloat16, parameters and their gradients in float32."""
    losses = []
    for cls in CLASSES:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )
        opt = cls(model.parameters(), lr=1e-3)
        its = scaler()
        inputs, targets = normal(0, (32, 8)), normal(1, (32, 1))
        for _ in range(20):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.nn.functional.mse_loss(model(inputs).float(), targets)
            its.scale(loss).backward()
            its.step(opt)
            its.update()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] < 0.8
