"""Promise: state is let go as soon as nobody has it, and each tensor of it is a tensor of its own.

For tests/test_torch_state.py (what is let go, swapped) and tests/test_torch_autograd.py (what is counted).
"""

import gc
import weakref

import pytest
import torch
from rmsprop.torch import RMSprop
from torch_pairs import CLASSES, Side, assert_same, bits, normal

ARRAYS = ("square_avg", "momentum_buffer", "grad_avg")
KEYS = ("step", *ARRAYS)
NUMELS = pytest.mark.parametrize("numel", [1, 100, 100_000])


def build(numel, steps=3, cls=RMSprop, count=3):
    params = [normal(k, (numel,)).requires_grad_() for k in range(count)]
    side = Side(params, cls(params, momentum=0.9, centered=True))
    side.train(range(steps))
    return side


# --- tests/test_torch_state.py ----------------------------------------------------------------


@NUMELS
@pytest.mark.parametrize("key", KEYS)
def test_an_optimizer_that_its_state_refers_to_is_collected(key, numel):
    def make():
        side = build(numel)
        state = side.opt.state[side.params[0]][key]
        state.owner = side.opt
        return [weakref.ref(one) for one in (side.opt, state, side.params[0])]

    refs = make()
    gc.collect()
    assert all(ref() is None for ref in refs)


def clear(opt):
    opt.state.clear()


def empty_entries(opt):
    for entry in opt.state.values():
        entry.clear()


def pop(opt):
    for param in list(opt.state):
        opt.state.pop(param)


def replace(opt):
    for param in list(opt.state):
        opt.state[param] = {
            key: value.clone() for key, value in opt.state[param].items()
        }


def load(opt):
    saved = opt.state_dict()
    for entry in saved["state"].values():
        entry.update({key: value.clone() for key, value in entry.items()})
    opt.load_state_dict(saved)


LETS_GO = (clear, empty_entries, pop, replace, load)


@NUMELS
@pytest.mark.parametrize("let_go", LETS_GO)
def test_state_that_is_taken_away_is_let_go(let_go, numel):
    """At once, not at the next step."""
    side = build(numel)
    refs = [
        weakref.ref(value)
        for entry in side.opt.state.values()
        for value in entry.values()
    ]
    assert len(refs) == 12
    let_go(side.opt)
    gc.collect()
    assert all(ref() is None for ref in refs)
    side.train([7])


@NUMELS
@pytest.mark.parametrize("key", KEYS)
def test_state_can_be_swapped(key, numel):
    """`torch.utils.swap_tensors` insists that nobody else refers to what is in the objects."""
    sides = [build(numel, cls=cls) for cls in CLASSES]
    for side in sides:
        state = side.opt.state[side.params[1]]
        before = bits(state[key])
        other = state[key].detach().clone() * 2
        torch.utils.swap_tensors(state[key], other)
        assert bits(other) == before
        side.train([7, 8])
    assert_same(*sides)


@NUMELS
def test_state_has_memory_of_its_own(numel):
    """And no gradient, base or object that it shares with other state."""
    side = build(numel)
    tensors = [value for entry in side.state() for value in entry.values()]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert len(storages) == len(tensors) == 12
    assert not any(tensor._is_view() for tensor in tensors)


# --- tests/test_torch_autograd.py -------------------------------------------------------------


def resets(entry, key):
    entry[key].zero_()


def copies(entry, key):
    entry[key].copy_(torch.ones_like(entry[key]))


def steps_alone(entry, key):
    """Another optimizer, with the state tensor for its parameter."""
    entry[key].grad = torch.ones_like(entry[key])
    RMSprop([entry[key]]).step()
    entry[key].grad = None


@NUMELS
@pytest.mark.parametrize("write", [resets, copies, steps_alone])
@pytest.mark.parametrize("key", ARRAYS)
def test_writing_state_spoils_no_backward_of_other_state(key, write, numel):
    """What a graph has saved of one parameter is not what was written of another, nor of other state."""
    side = build(numel)
    weight = normal(7, (numel,)).requires_grad_()
    entries = side.state()
    loss = (weight * entries[0][key]).sum()
    wanted = entries[0][key].clone()
    for entry in entries[1:]:
        write(entry, key)
    for other in set(ARRAYS) - {key}:
        write(entries[0], other)
    loss.backward()
    assert torch.equal(weight.grad, wanted)
    loss = (weight * entries[0][key]).sum()
    write(entries[0], key)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@NUMELS
def test_a_step_counts_what_it_writes_and_nothing_else(numel):
    """Of the parameters that have a gradient; as torch's own for each tensor, though perhaps not as often."""
    side = build(numel)
    for seed in range(3):
        side.set_gradients(seed)
        side.params[1].grad = None
        tensors = [
            [param, *(side.opt.state[param][key] for key in ARRAYS)]
            for param in side.params
        ]
        before = [[tensor._version for tensor in some] for some in tensors]
        side.opt.step()
        after = [[tensor._version for tensor in some] for some in tensors]
        assert after[1] == before[1]
        for k in (0, 2):
            assert all(map(int.__lt__, before[k], after[k]))
