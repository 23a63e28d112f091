"""Promise: every learning-rate scheduler of torch drives `rmsprop.torch.RMSprop` as it drives torch's own."""

import functools

import pytest
import torch
from rmsprop.torch import RMSprop
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR
from torch_pairs import (
    CLASSES,
    Side,
    Stock,
    assert_same,
    build,
    parameters,
    snapshot,
)

STEPS = 12


def sequential(opt):
    warmup = schedulers.LinearLR(opt, start_factor=0.1, total_iters=3)
    decay = schedulers.ExponentialLR(opt, gamma=0.8)
    return schedulers.SequentialLR(opt, [warmup, decay], milestones=[4])


def chained(opt):
    halves = schedulers.StepLR(opt, step_size=3, gamma=0.5)
    constant = schedulers.ConstantLR(opt, factor=0.3, total_iters=5)
    return schedulers.ChainedScheduler([halves, constant], optimizer=opt)


MAKERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.8),
    "StepLR": lambda o: schedulers.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, milestones=[2, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.5, total_iters=4),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.2, total_iters=6),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, gamma=0.7),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=6),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, base_lr=1e-3, max_lr=0.1, step_size_up=3
    ),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(
        o, T_0=3
    ),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "SWALR": lambda o: SWALR(o, swa_lr=0.5, anneal_epochs=4),
}
each = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def test_every_scheduler_is_here():
    found = {
        name
        for name, it in vars(schedulers).items()
        if isinstance(it, type) and issubclass(it, schedulers.LRScheduler)
    }
    assert found - {"LRScheduler", "_LRScheduler"} == MAKERS.keys() - {"SWALR"}


def advance(scheduler, step):
    """One step of a scheduler; the one that watches a loss sees it rise."""
    if isinstance(scheduler, schedulers.ReduceLROnPlateau):
        scheduler.step(1.0 + step)
    else:
        scheduler.step()


def hyperparameters(opt):
    return [(float(g["lr"]), g["momentum"]) for g in opt.param_groups]


def groups_of_two(cls, lr, momentum):
    params = parameters(0)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    return Side(params, cls(groups, lr=lr(), momentum=momentum))


RATES = {"float": lambda: 0.05, "tensor": lambda: torch.tensor(0.05)}


@each
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_side_by_side(make, rate, momentum):
    """The same rates and momenta at every step, without a warning, and the same steps.

    CyclicLR and OneCycleLR move the momentum, and switch it on where it was 0.
    """
    sides = [groups_of_two(cls, rate, momentum) for cls in CLASSES]
    driven = [make(side.opt) for side in sides]
    seen = set()
    for step in range(STEPS):
        for side, scheduler in zip(sides, driven, strict=True):
            side.train([step])
            advance(scheduler, step)
        rates = [hyperparameters(side.opt) for side in sides]
        assert rates[0] == rates[1]
        seen.add(tuple(rates[1]))
    assert len(seen) > 1
    assert_same(*sides)


@each
def test_a_tensor_rate_stays_the_same_tensor(make):
    side = groups_of_two(RMSprop, RATES["tensor"], 0.9)
    kept = [group["lr"] for group in side.opt.param_groups]
    scheduler = make(side.opt)
    for step in range(4):
        side.train([step])
        advance(scheduler, step)
    same = [
        group["lr"] is rate
        for group, rate in zip(side.opt.param_groups, kept, strict=True)
    ]
    stock = groups_of_two(Stock, RATES["tensor"], 0.9)
    kept = [group["lr"] for group in stock.opt.param_groups]
    make(stock.opt)
    assert same == [
        group["lr"] is rate
        for group, rate in zip(stock.opt.param_groups, kept, strict=True)
    ]


@each
def test_resumed_with_its_scheduler(make):
    """Optimizer and scheduler saved in the middle; the rest is the same to the bit."""
    whole = groups_of_two(RMSprop, RATES["float"], 0.9)
    scheduler = make(whole.opt)
    for step in range(5):
        whole.train([step])
        advance(scheduler, step)
    params = [p.detach().clone().requires_grad_() for p in whole.params]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    rest = Side(params, RMSprop(groups, lr=0.05, momentum=0.9))
    resumed = make(rest.opt)
    resumed.load_state_dict(scheduler.state_dict())
    rest.opt.load_state_dict(whole.opt.state_dict())
    for state in rest.state():  # tensors that fit are taken over, not copied
        state.update({key: value.clone() for key, value in state.items()})
    for step in range(5, STEPS):
        for side, driver in ((whole, scheduler), (rest, resumed)):
            side.train([step])
            advance(driver, step)
    assert snapshot(whole) == snapshot(rest)


def test_the_order_of_steps_is_watched():
    """A scheduler that steps first is warned of, with ours as with torch's."""
    for cls in CLASSES:
        side = build(cls)
        scheduler = schedulers.StepLR(side.opt, step_size=1)
        side.set_gradients(0)
        with pytest.warns(UserWarning, match="lr_scheduler.step"):
            scheduler.step()


def test_a_group_added_under_a_scheduler():
    sides = []
    for cls in CLASSES:
        side = build(cls, lr=0.1)
        scheduler = schedulers.ExponentialLR(side.opt, gamma=0.5)
        side.train([0])
        scheduler.step()
        side.params.append(parameters(9)[0])
        side.opt.add_param_group({"params": side.params[-1], "lr": 0.3})
        side.train([1])
        sides.append(side)
    assert_same(*sides)


def test_schedules_of_our_own_options():
    """Any option is a number in a group, for whoever moves it."""
    side = build(RMSprop, bias_correction=True, alpha=0.9)
    other = build(RMSprop, bias_correction=True, alpha=0.9)
    move = functools.partial(side.opt.param_groups[0].__setitem__, "alpha")
    for step in range(3):
        move(0.9 + step / 100)
        side.train([step])
        other.train([step])
    assert snapshot(side) != snapshot(other)
