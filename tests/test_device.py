"""Memory that is not the host's is refused with a ValueError that names the device; nothing changes."""

import pytest
import torch
from problems import random_arrays, snapshot
from producers import CUDA, Handmade
from rmsprop import RMSprop

ELSEWHERE = {
    "meta": lambda array: torch.from_numpy(array).to("meta"),
    "cuda:0": lambda array: Handmade(array, device=CUDA),
}
elsewhere = pytest.mark.parametrize(
    ("device", "move"), ELSEWHERE.items(), ids=ELSEWHERE
)


@pytest.fixture
def arrays():
    return random_arrays(0, [(6, 4), (5,)])


def message(culprit, device):
    return f"^{culprit}: expected an array in host memory, got {device}"


@elsewhere
def test_parameter(device, move, arrays):
    first, second = arrays
    with pytest.raises(ValueError, match=message("parameter 1", device)):
        RMSprop([first, move(second)])
    opt = RMSprop([first])
    before = snapshot(opt)
    with pytest.raises(ValueError, match=message("parameter 1", device)):
        opt.add_param_group({"params": [move(second)]})
    assert snapshot(opt) == before


@elsewhere
def test_gradient(device, move, arrays):
    grads = random_arrays(1, [(6, 4), (5,)])
    opt = RMSprop(arrays)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=message("gradient 1", device)):
        opt.step(grads=[grads[0], move(grads[1])])
    assert snapshot(opt) == before


@elsewhere
def test_state(device, move, arrays):
    opt = RMSprop(arrays)
    before = snapshot(opt)
    saved = opt.state_dict()
    saved["state"][0]["square_avg"] += 1
    saved["state"][1]["square_avg"] = move(saved["state"][1]["square_avg"])
    culprit = "state square_avg of parameter 1"
    with pytest.raises(ValueError, match=message(culprit, device)):
        opt.load_state_dict(saved)
    with pytest.raises(ValueError, match=message(culprit, device)):
        opt.state[1]["square_avg"] = saved["state"][1]["square_avg"]
    assert snapshot(opt) == before
