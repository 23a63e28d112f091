"""`opt.state` shows the optimizer's own memory; what is made of it, or loaded from it, are values."""

import copy
import pickle

import numpy as np
import pytest
from problems import bits, random_parameters, train
from rmsprop import RMSprop


def build(contiguous):
    """Four parameters after two steps, the first two of one shape."""
    params = random_parameters(0, shapes=((5,), (5,), (), (2, 3)))
    opt = RMSprop(params, momentum=0.9, contiguous_params=contiguous)
    train(opt, params, range(2))
    return params, opt


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda view: pickle.loads(pickle.dumps(view)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_plain_dicts(duplicate, contiguous):
    """Without the optimizer, which is not copied along."""
    _, opt = build(contiguous)
    copied, entry = duplicate(opt.state), duplicate(opt.state[0])
    assert (type(copied), type(entry)) == (dict, dict)
    assert bits(copied) == bits(opt.state)
    assert bits(entry) == bits(opt.state[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, COPIES["pickle"]])
def test_deep_copies_stay_as_they_are(duplicate, contiguous):
    params, opt = build(contiguous)
    copied, entry = duplicate(opt.state), duplicate(opt.state[0])
    before = bits([copied, entry])
    train(opt, params, [2])
    opt.state[0]["square_avg"][...] = 9
    assert bits([copied, entry]) == before


SWAPS = {
    "load_state_dict": lambda opt, entries: opt.load_state_dict(
        {
            "state": {**opt.state, 0: entries[1], 1: entries[0]},
            "param_groups": opt.state_dict()["param_groups"],
        }
    ),
    "load_state_dict, of dicts": lambda opt, entries: opt.load_state_dict(
        {
            "state": {**opt.state, 0: dict(entries[1]), 1: dict(entries[0])},
            "param_groups": opt.state_dict()["param_groups"],
        }
    ),
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
def test_views_can_be_swapped(swap, contiguous):
    """Everything is read before anything is written."""
    _, opt = build(contiguous)
    first, second, *rest = opt.state_dict()["state"].values()
    assert bits(first) != bits(second)
    swap(opt, [opt.state[0], opt.state[1]])
    assert bits(list(opt.state.values())) == bits([second, first, *rest])


def test_views_can_be_assigned(contiguous):
    _, opt = build(contiguous)
    first, second, *rest = opt.state_dict()["state"].values()
    opt.state[0] = opt.state[0]
    opt.state[1]["square_avg"] = opt.state[1]["square_avg"][::-1]
    second["square_avg"] = second["square_avg"][::-1].copy()
    assert bits(list(opt.state.values())) == bits([first, second, *rest])
    opt.state[0] = opt.state[1]
    assert bits(list(opt.state.values())) == bits([second, second, *rest])
    assert not np.shares_memory(opt.state[0]["square_avg"], opt.state[1]["square_avg"])


def test_popped_state_is_what_it_was():
    """And the entry goes back to its start."""
    param = np.ones(3, np.float32)
    opt = RMSprop([param])
    opt.step(grads=[np.full(3, 2, np.float32)])
    was = opt.state[0]["square_avg"].copy()
    assert (opt.state[0].pop("square_avg") == was).all()
    assert not opt.state[0]["square_avg"].any()
    opt.state[0]["square_avg"] = was
    popped = opt.state.pop(0)
    assert popped["step"] == 1
    assert (popped["square_avg"] == was).all()
    assert opt.state[0]["step"] == 0
    assert opt.state.pop(7, None) is None
    assert 3 not in opt.state[0]
