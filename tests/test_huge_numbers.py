"""A number too large for the machine is out of range, not of the wrong type."""

import pytest
from problems import bits, random_arrays
from rmsprop import Parameter, RMSprop

HUGE = pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["+", "-"])
OPTIONS = pytest.mark.parametrize(
    "key", ["lr", "alpha", "eps", "weight_decay", "momentum", "initial_square_avg"]
)


@OPTIONS
@HUGE
def test_option_in_the_constructor(key, value):
    with pytest.raises(ValueError, match=f"^{key}: expected a finite number"):
        RMSprop(random_arrays(0), **{key: value})


@OPTIONS
@HUGE
def test_option_of_a_group(key, value, contiguous):
    """Given, changed later, or loaded."""
    a, b, c = (Parameter(array) for array in random_arrays(0, [(3,)] * 3))
    culprit = f"^{key} of group 1.*: expected a finite number"
    bad = {"params": [b], key: value}
    with pytest.raises(ValueError, match=culprit):
        RMSprop([{"params": [a]}, bad], contiguous_params=contiguous)
    opt = RMSprop([a], contiguous_params=contiguous)
    with pytest.raises(ValueError, match=culprit):
        opt.add_param_group(bad)
    opt.add_param_group({"params": [c]})
    saved = opt.state_dict()
    saved["param_groups"][1][key] = value
    with pytest.raises(ValueError, match=culprit):
        opt.load_state_dict(saved)
    opt.param_groups[1][key] = value
    before = bits([a, c, opt.state_dict()["state"]])
    with pytest.raises(ValueError, match=culprit):
        opt.step(grads=random_arrays(1, [(3,)] * 2))
    assert bits([a, c, opt.state_dict()["state"]]) == before


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("option", "power"),
    [("max_grad_norm", 1024), ("threads", 63), ("threads", 64), ("threads", 70)],
)
def test_option_of_the_optimizer(option, power, sign):
    params, value = random_arrays(0), sign * 2**power
    with pytest.raises(ValueError, match=f"^{option}: expected a.* number"):
        RMSprop(params, **{option: value})
    opt = RMSprop(params)
    before = getattr(opt, option)
    with pytest.raises(ValueError, match=f"^{option}: expected a.* number"):
        setattr(opt, option, value)
    assert getattr(opt, option) == before
