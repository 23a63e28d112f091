"""Promise: `ema_decay` averages each parameter in the same pass, and `averaged` puts that in its place.

Bits of every combination beside the oracle are in test_bits.py; instruction sets in test_isa.py.
"""

import copy
import os
import pickle
import tracemalloc

import numpy as np
import pytest
import rmsprop
import torch
from oracle import Oracle
from problems import bits, random_arrays
from rmsprop import Parameter, RMSprop, dialect
from rmsprop.torch import RMSprop as TorchRMSprop
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

os.environ.setdefault("KERAS_BACKEND", "jax")
OPTIONS = {"lr": 0.1, "momentum": 0.9, "clip_weights": 0.5, "ema_decay": 0.9}
SAME = {"eps_in_sqrt": True, "lr_in_momentum": True}  # as the array class has them


def start(dtype="float32"):
    large = np.random.default_rng(0).normal(size=(70, 1000)).astype(dtype)
    return [*random_arrays(0), large]


def gradients(seed, dtype="float32"):
    large = np.random.default_rng(seed).normal(size=(70, 1000)).astype(dtype)
    return [*random_arrays(seed), large]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 2])
def test_both_fronts(dtype, threads, contiguous):
    params = [Parameter(a.copy()) for a in start(dtype)]
    tensors = [torch.nn.Parameter(torch.tensor(a)) for a in start(dtype)]
    oracle = Oracle(start(dtype), **OPTIONS)
    here = RMSprop(params, threads=threads, contiguous_params=contiguous, **OPTIONS)
    there = TorchRMSprop(
        tensors, threads=threads, contiguous_params=contiguous, **SAME, **OPTIONS
    )
    for p, g in zip(params, gradients(1, dtype), strict=True):
        p.grad = g
    for seed in (1, 2, 3):
        grads = gradients(seed, dtype)
        for p, t, g in zip(params, tensors, grads, strict=True):
            p.grad[...] = g
            t.grad = torch.tensor(g)
        oracle.step(grads)
        here.step()
        there.step()
    assert bits(here.state_dict()["state"]) == bits(oracle.state)
    wanted = bits([entry["ema"] for entry in oracle.state.values()])
    assert bits([there.state[t]["ema"].numpy() for t in tensors]) == wanted
    with here.averaged(), there.averaged():
        assert bits([p.data for p in params]) == wanted
        assert bits([t.detach().numpy() for t in tensors]) == wanted
    assert bits([p.data for p in params]) == bits(oracle.params)
    assert bits([t.detach().numpy() for t in tensors]) == bits(oracle.params)


def test_it_begins_as_the_parameter_before_its_first_update(contiguous):
    """Of each by itself: one without a gradient has none, and keeps its value in `averaged`."""
    params = [Parameter(np.full(3, x)) for x in (1.0, 2.0)]
    opt = RMSprop(params, lr=0.1, ema_decay=1.0, contiguous_params=contiguous)
    params[0].data[...] = 5.0  # after construction
    assert "ema" not in opt.state[0]
    with opt.averaged():
        assert params[0].data[0] == 5.0
    opt.step(grads=[np.ones(3), None])
    assert "ema" in opt.state[0]
    assert "ema" not in opt.state[1]
    with pytest.raises(KeyError):
        opt.state[1]["ema"]
    with opt.averaged():
        assert (params[0].data[0], params[1].data[0]) == (5.0, 2.0)
    params[1].data[...] = 7.0
    for p in params:
        p.grad = np.ones(3)
    opt.step()
    assert [opt.state[k]["ema"][0] for k in (0, 1)] == [5.0, 7.0]


@pytest.mark.parametrize("front", ["arrays", "torch"])
def test_switched_on_later_and_off(front):
    """It begins at the step that it is on at first; off, it stays as it is."""
    w = np.full(3, 4.0)
    t = torch.nn.Parameter(torch.tensor(w))
    opt = RMSprop([w], lr=1.0) if front == "arrays" else TorchRMSprop([t], lr=1.0)

    def step():
        t.grad = torch.ones(3, dtype=torch.float64)
        opt.step(**({"grads": [np.ones(3)]} if front == "arrays" else {}))
        return w[0] if front == "arrays" else t[0].item()

    def ema():
        entry = opt.state[0 if front == "arrays" else t]
        return float(entry["ema"][0]) if "ema" in entry else None

    before = step()
    assert ema() is None
    opt.param_groups[0]["ema_decay"] = 0.5
    after = step()
    assert ema() == pytest.approx(0.5 * before + 0.5 * after, rel=1e-15)
    found = ema()
    opt.param_groups[0]["ema_decay"] = None
    step()
    assert ema() == found


def test_torchs_averaged_model():
    """`AveragedModel` with `get_ema_multi_avg_fn`, which begins as the model is before the first step."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(net)
    opt = TorchRMSprop(net.parameters(), lr=0.01, ema_decay=0.9)
    for _ in range(20):
        opt.zero_grad()
        net(torch.randn(5, 8)).square().sum().backward()
        opt.step()
        theirs.update_parameters(net)
    for p, q in zip(net.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(opt.state[p]["ema"], q, rtol=1e-6, atol=1e-7)
    x = torch.randn(5, 8)
    with opt.averaged(), torch.no_grad():
        torch.testing.assert_close(net(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_keras_ema():
    """Keras' `use_ema` begins as the variable is after the first step; from there on it is the same."""
    import keras

    w = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    variable = keras.Variable(w)
    theirs = keras.optimizers.RMSprop(0.01, use_ema=True, ema_momentum=0.9)
    opt = RMSprop([w], lr=0.01, ema_decay=0.9, **dialect("keras"))
    for seed in range(10):
        g = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
        theirs.apply([keras.ops.convert_to_tensor(g)], [variable])
        opt.step(grads=[g])
        if seed == 0:
            opt.state[0]["ema"] = w
    (average,) = theirs._model_variables_moving_average
    found = keras.ops.convert_to_numpy(average)
    np.testing.assert_allclose(opt.state[0]["ema"], found, rtol=1e-5)


INSIDE = {
    "step": lambda opt, _: opt.step(),
    "averaged": lambda opt, _: opt.averaged(),
    "state_dict": lambda opt, _: opt.state_dict(),
    "load_state_dict": lambda opt, saved: opt.load_state_dict(saved),
    "add_param_group": lambda opt, _: opt.add_param_group({"params": [np.ones(2)]}),
}


def made(front):
    """An optimizer after a step, its parameter, and that as an array."""
    if front == "arrays":
        w = Parameter(np.ones(3, np.float32))
        w.grad = np.ones(3, np.float32)
        opt, array = RMSprop([w], lr=0.1, ema_decay=0.9), w.data
    else:
        w = torch.nn.Parameter(torch.ones(3))
        w.grad = torch.ones(3)
        opt = TorchRMSprop([w], lr=0.1, ema_decay=0.9)
        array = w.detach().numpy()
    opt.step()
    return opt, w, array


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("front", ["arrays", "torch"])
def test_inside_nothing_is_trained(front, name):
    """A RuntimeError that names what was called; the context ends as ever, and all goes on."""
    opt, _, array = made(front)
    own, saved = array.copy(), opt.state_dict()
    refusal = pytest.raises(RuntimeError, match=f"^{name}: expected parameters as they")
    with refusal, opt.averaged():
        assert not np.array_equal(array, own)
        INSIDE[name](opt, saved)
    np.testing.assert_array_equal(array, own)
    opt.step()
    with opt.averaged():
        pass


@pytest.mark.parametrize("front", ["arrays", "torch"])
def test_copies_inside_are_refused(front):
    opt, _, _ = made(front)
    with opt.averaged():
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match="leave averaged"):
                copied(opt)


def test_autograd_is_told():
    """A backward through what the parameters were raises."""
    opt, w, _ = made("torch")
    loss = (w * w).sum()
    with opt.averaged():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strided_parameters_and_tensors():
    base = np.arange(24.0).reshape(4, 6)
    tensor = torch.arange(6.0)
    params = [base[::2, ::3], base.T[1::3, 1::2], tensor]
    opt = RMSprop(params, lr=0.1, ema_decay=0.5)
    grads = [np.ones((2, 2)), np.ones((2, 2)), np.ones(6, np.float32)]
    opt.step(grads=grads)
    params[2] = tensor.numpy()
    own = [p.copy() for p in params]
    wanted = [opt.state[k]["ema"].copy() for k in range(3)]
    untouched = base[3, 5]
    version = tensor._version
    with opt.averaged():
        assert tensor._version > version
        for p, average in zip(params, wanted, strict=True):
            np.testing.assert_array_equal(p, average)
    for p, value in zip(params, own, strict=True):
        np.testing.assert_array_equal(p, value)
    assert base[3, 5] == untouched


@pytest.mark.parametrize("shape", [(2_000_000,), (2, 1_000_000), (1_000_000, 2)])
def test_no_temporaries(shape):
    """Neither the step nor the exchange makes an array of a parameter's size."""
    w, g = np.ones(shape, np.float32), np.ones(shape, np.float32)
    opt = RMSprop([w], ema_decay=0.9)
    opt.step(grads=[g])
    tracemalloc.start()
    try:
        opt.step(grads=[g])
        with opt.averaged():
            pass
        assert tracemalloc.get_traced_memory()[1] < w.nbytes / 10
    finally:
        tracemalloc.stop()


def test_checkpoints(tmp_path):
    """By every way, and on to the other front and back; then the next steps are the same."""
    opt, w, _ = made("arrays")
    opt2, w2 = pickle.loads(pickle.dumps((opt, w)))
    opt3, w3 = copy.deepcopy((opt, w))
    rmsprop.save(tmp_path / "c", opt)
    w4 = Parameter(np.zeros(3, np.float32))
    opt4 = RMSprop([w4])
    rmsprop.load(tmp_path / "c", opt4)
    w4.grad = w.grad
    w5 = torch.nn.Parameter(torch.tensor(w.data))
    opt5 = TorchRMSprop([w5], ema_decay=0.9, **SAME)
    opt5.load_state_dict(opt.state_dict())
    w5.grad = torch.ones(3)
    w6 = Parameter(w.data.copy())
    opt6 = RMSprop([w6], ema_decay=0.9)
    opt6.load_state_dict(opt5.state_dict())
    w6.grad = w.grad
    for each in (opt, opt2, opt3, opt4, opt5, opt6):
        each.step()
    wanted = bits([w.data, opt.state[0]["ema"]])
    for other, parameter in ((opt2, w2), (opt3, w3), (opt4, w4), (opt6, w6)):
        assert bits([parameter.data, other.state[0]["ema"]]) == wanted
    assert bits([w5.detach().numpy(), opt5.state[w5]["ema"].numpy()]) == wanted


def test_loading_a_checkpoint_without_one_begins_it_anew():
    opt, w, _ = made("arrays")
    saved = opt.state_dict()
    del saved["state"][0]["ema"]
    opt.load_state_dict(saved)
    assert "ema" not in opt.state[0]
    w.data[...] = 3.0
    opt.param_groups[0]["ema_decay"] = 1.0
    opt.step()
    assert opt.state[0]["ema"][0] == 3.0
    del opt.state[0]["ema"]
    assert "ema" not in opt.state[0]


def test_a_step_that_is_left_out_begins_nothing():
    w = np.ones(3)
    opt = RMSprop([w], ema_decay=0.5, nonfinite="skip")
    opt.step(grads=[np.full(3, np.nan)])
    assert "ema" not in opt.state[0]
    assert opt.skipped_steps == 1


def test_parameters_that_cannot_be_exchanged():
    """Nothing is exchanged then."""
    opt, w, array = made("torch")
    opt.state[w]["ema"] = torch.ones(2)
    own = array.copy()
    with pytest.raises(ValueError, match="expected an ema like its parameter"):
        opt.averaged().__enter__()
    np.testing.assert_array_equal(array, own)
    opt, w, array = made("arrays")
    array.flags.writeable = False
    with pytest.raises(ValueError, match="expected writable parameters"):
        opt.averaged().__enter__()


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_range(value):
    with pytest.raises(ValueError, match="ema_decay: expected a number from 0 to 1"):
        RMSprop([np.ones(2)], ema_decay=value)
