"""State in 8 bits and bfloat16, and 16-bit parameters: how accurate, how large, what is refused, what is loaded.

That the bits are those of the rule is in test_stored_bits.py.
"""

import builtins
import pickle

import ml_dtypes
import numpy as np
import pytest
import rmsprop
import torch
from problems import bits
from rmsprop import RMSprop
from rmsprop.torch import RMSprop as TorchRMSprop

BF16 = np.dtype(ml_dtypes.bfloat16)
NARROW = pytest.mark.parametrize("storage", ["bfloat16", "uint8"])


def normal(seed, shape, scale=1.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def numbers(opt, key="square_avg", index=0):
    """What an array of state stands for."""
    wide = RMSprop.float32_state(opt.state_dict())
    return wide["state"][index][key].astype(np.float64)


# --- accuracy ----------------------------------------------------------------------------------


@NARROW
@pytest.mark.parametrize("scale", [0.01, 0.1])
def test_each_step_from_equal_state(storage, scale):
    """bitsandbytes' own test of blockwise RMSprop, its sizes and thresholds: the state within 3e-3 but
    for 20 elements, the update to 6e-5 and relatively to 6e-4, at each of 50 steps."""
    shape = (1024, 1024)
    w = normal(0, shape, 0.1)
    wide = w.copy()
    opt = RMSprop([w], lr=0.01, alpha=0.9, state_dtype=storage, eps_in_sqrt=False)
    exact = RMSprop([wide], lr=0.01, alpha=0.9, eps_in_sqrt=False)
    for step in range(50):
        exact.state[0]["square_avg"] = numbers(opt).astype(np.float32)
        wide[...] = w
        g = normal(step + 1, shape, scale)
        opt.step(grads=[g])
        exact.step(grads=[g])
        error = np.abs(w.astype(np.float64) - wide)
        assert error.mean() < 6e-5
        assert (error / (np.abs(wide) + 1e-9)).mean() < 6e-4
        far = ~np.isclose(
            numbers(opt), exact.state[0]["square_avg"], atol=3e-3, rtol=1e-3
        )
        assert far.sum() <= 20


def test_each_step_of_bfloat16_parameters():
    """The same for parameters that are rounded to nearest: 1.7e-4 and 1.6e-3."""
    shape = (1024, 1024)
    w = normal(0, shape, 0.1).astype(BF16)
    opt = RMSprop([w], lr=0.01, alpha=0.9, state_dtype="uint8", eps_in_sqrt=False)
    for step in range(10):
        wide = w.astype(np.float32)
        exact = RMSprop([wide], lr=0.01, alpha=0.9, eps_in_sqrt=False)
        exact.state[0]["square_avg"] = numbers(opt).astype(np.float32)
        g = normal(step + 1, shape, 0.1)
        opt.step(grads=[g])
        exact.step(grads=[g])
        error = np.abs(w.astype(np.float64) - wide)
        assert error.mean() < 1.7e-4
        assert (error / (np.abs(wide) + 1e-9)).mean() < 1.6e-3


@pytest.mark.parametrize(
    ("storage", "alpha", "steps", "rms"),
    [
        ("uint8", 0.9, 50, 0.07),
        ("uint8", 0.99, 3000, 0.11),
        ("uint8", 0.999, 3000, 0.13),
        ("bfloat16", 0.99, 3000, 0.02),
        ("bfloat16", 0.999, 3000, 0.03),
    ],
)
def test_free_running(storage, alpha, steps, rms):
    """The root that the update divides by, beside the exact one: no bias, and little noise."""
    numel = 16 * 1024
    scales = 10.0 ** np.random.default_rng(1).uniform(-2, 0, numel)
    opts = [
        RMSprop([np.zeros(numel, np.float32)], lr=0, alpha=alpha, state_dtype=dtype)
        for dtype in (storage, None)
    ]
    for step in range(steps):
        g = (scales * normal(step, numel)).astype(np.float32)
        for opt in opts:
            opt.step(grads=[g])
    found, exact = (numbers(opt) for opt in opts)
    ratio = np.sqrt(found / exact)
    assert abs(ratio.mean() - 1) < 0.01
    assert np.sqrt(np.mean((ratio - 1) ** 2)) < rms


@NARROW
def test_a_constant_gradient_converges_to_its_square(storage):
    """Rounding to nearest would stop at 0.98 of it: what a step adds is less than half a unit then."""
    g = np.full(8192, 0.3, np.float32)
    opt = RMSprop([np.zeros_like(g)], lr=0, alpha=0.999, state_dtype=storage)
    nearest = np.zeros(1, BF16)
    for _ in range(8000):
        opt.step(grads=[g])
        nearest[...] = (
            np.float32(0.999) * nearest.astype(np.float32)
            + np.float32(0.001) * g[0] ** 2
        )
    assert abs(numbers(opt).mean() / 0.09 - 1) < 2e-3
    assert float(nearest[0]) / 0.09 < 0.985


@pytest.mark.parametrize("dtype", ["float16", BF16], ids=str)
def test_small_updates_are_kept_on_average(dtype):
    """Each is a fortieth of what the parameter can tell apart: nearest loses them all."""
    ends = {}
    for rounding in ("nearest", "stochastic"):
        w = np.ones(20_000, dtype)
        opt = RMSprop(
            [w], lr=1e-4 if dtype == BF16 else 1e-5, alpha=0, rounding=rounding
        )
        for _ in range(200):
            opt.step(grads=[np.ones(20_000, dtype)])
        ends[rounding] = w.astype(np.float64).mean()
    assert ends["nearest"] == 1
    wanted = 1 - 200 * (1e-4 if dtype == BF16 else 1e-5)
    assert abs(ends["stochastic"] - wanted) < 2e-4


@NARROW
def test_nan_and_infinity_stay_in_their_element(storage):
    w = np.ones(5000, np.float32)
    opt = RMSprop([w], state_dtype=storage, momentum=0.9)
    g = normal(1, 5000)
    g[7], g[1000] = np.nan, np.inf
    opt.step(grads=[g])
    v = numbers(opt)
    assert np.isnan(v[7])
    assert np.isposinf(v[1000])
    assert np.isfinite(np.delete(v, [7, 1000])).all()
    assert np.isfinite(np.delete(w, [7, 1000])).all()
    opt.step(grads=[normal(2, 5000)])
    assert np.flatnonzero(~np.isfinite(numbers(opt))).tolist() == [7, 1000]


@pytest.mark.parametrize("bits_of_master", [24, 32])
def test_master_bits(bits_of_master):
    """With 32 training is float32's, bit for bit, over 1,000 steps; with 24 it stays close."""
    w = normal(0, 3000).astype(BF16)
    wide = w.astype(np.float32)
    options = {"lr": 1e-3, "momentum": 0.9, "centered": True, "weight_decay": 0.01}
    opt = RMSprop([w], master_weight_bits=bits_of_master, **options)
    exact = RMSprop([wide], **options)
    for step in range(1000):
        g = normal(step, 3000).astype(BF16)
        opt.step(grads=[g])
        exact.step(grads=[g.astype(np.float32)])
    (full,) = opt.float32_params()
    if bits_of_master == 32:
        assert bits(full) == bits(wide)
        # The parameter is the nearest to it.
        assert np.abs(w.astype(np.float32) - full).max() <= np.abs(wide).max() * 2**-8
    else:
        assert np.abs(full - wide).max() < 0.05


def test_who_writes_the_parameter_shifts_the_value():
    w = normal(0, 100).astype(BF16)
    opt = RMSprop([w], lr=0.01, master_weight_bits=32)
    opt.step(grads=[normal(1, 100).astype(BF16)])
    w[...] = 0  # of either sign of the error bits
    (full,) = opt.float32_params()
    assert np.isfinite(full).all()
    assert np.abs(full).max() < 1e-30
    w[...] = np.inf
    assert np.isposinf(np.abs(opt.float32_params()[0])).any()
    assert not np.isnan(opt.float32_params()[0]).any()


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "bytes_an_element"),
    [
        ({"state_dtype": "uint8"}, 1.03),
        ({"state_dtype": "bfloat16"}, 2.01),
        ({"state_dtype": "uint8", "momentum": 0.9}, 2.06),
    ],
)
@pytest.mark.parametrize("front", [RMSprop, TorchRMSprop])
def test_bytes_of_state(front, options, bytes_an_element):
    numel = 1_000_000
    if front is RMSprop:
        opt = RMSprop([np.zeros(numel, np.float32)], **options)
        opt.step(grads=[np.ones(numel, np.float32)])
        arrays = [v for k, v in opt.state[0].items() if k != "step"]
    else:
        p = torch.nn.Parameter(torch.zeros(numel))
        opt = TorchRMSprop([p], **options)
        p.grad = torch.ones(numel)
        opt.step()
        arrays = [v for k, v in opt.state[p].items() if k != "step"]
    assert sum(array.nbytes for array in arrays) < numel * bytes_an_element


def test_small_parameters_keep_wide_state():
    opt = RMSprop(
        [np.zeros(4096, np.float32), np.zeros(4097, np.float32)], state_dtype="uint8"
    )
    assert [opt.state[i]["square_avg"].dtype for i in (0, 1)] == [np.float32, np.uint8]
    assert opt.state[1]["square_avg_scale"].shape == (17,)


# --- what is refused ---------------------------------------------------------------------------

W32, W64 = (np.ones(5000, dtype) for dtype in (np.float32, np.float64))
BAD = [
    (
        {"state_dtype": "float16"},
        ValueError,
        "state_dtype: expected 'float32', 'bfloat16', 'uint8'",
    ),
    ({"state_dtype": 8}, TypeError, "state_dtype: .*got int 8"),
    (
        {"state_dtype": {"step": "float32"}},
        ValueError,
        "state_dtype: expected keys among square_avg",
    ),
    (
        {"state_dtype": {"error_bits": "uint8"}},
        ValueError,
        "state_dtype: expected keys",
    ),
    (
        {"state_dtype": {"square_avg": "int8"}},
        ValueError,
        "state_dtype of square_avg: expected",
    ),
    (
        {"state_dtype": {"square_avg": 8}},
        TypeError,
        "state_dtype of square_avg: expected",
    ),
    (
        {"rounding": "up"},
        ValueError,
        "rounding: expected 'nearest' or 'stochastic', got 'up'",
    ),
    (
        {"master_weight_bits": 16},
        ValueError,
        "master_weight_bits: expected None, 24 or 32, got 16",
    ),
    (
        {"seed": -1},
        ValueError,
        r"seed: expected an integer from 0 to 2\*\*64 - 1, got -1",
    ),
    ({"seed": 2**64}, ValueError, "seed: expected an integer"),
    ({"seed": 0.5}, TypeError, "seed: expected an integer, got float 0.5"),
    (
        {"centered": True, "state_dtype": "uint8"},
        ValueError,
        "centered of group 0: expected False",
    ),
    (
        {"centered": True, "state_dtype": {"grad_avg": "uint8"}},
        ValueError,
        "centered of group 0: expected False with grad_avg in uint8",
    ),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("front", [RMSprop, TorchRMSprop])
def test_options(front, options, error, match):
    params = [W32] if front is RMSprop else [torch.nn.Parameter(torch.ones(5000))]
    with pytest.raises(error, match=match):
        front(params, **options)


@pytest.mark.parametrize("front", [RMSprop, TorchRMSprop])
def test_parameters(front):
    def param(dtype):
        array = np.ones(5, dtype)
        return (
            array if front is RMSprop else torch.nn.Parameter(torch.from_numpy(array))
        )

    with pytest.raises(
        ValueError,
        match="parameter 1: expected another dtype than float64, with state_dtype",
    ):
        front([param("float32"), param("float64")], state_dtype="bfloat16")
    with pytest.raises(
        ValueError,
        match="parameter 0: expected another dtype than float16, with master_weight",
    ):
        front([param("float16")], master_weight_bits=24)
    front(
        [param("float32"), param("float64")], master_weight_bits=24
    )  # which ignore it


def test_centered_later():
    opt = RMSprop([W32.copy()], state_dtype="uint8")
    opt.param_groups[0]["centered"] = True
    with pytest.raises(ValueError, match="centered of group 0: expected False"):
        opt.step(grads=[W32])
    assert opt.state[0]["step"] == 0


@pytest.mark.parametrize("front", [RMSprop, TorchRMSprop])
def test_they_are_the_optimizers_own_and_constant(front):
    w = W32.copy() if front is RMSprop else torch.nn.Parameter(torch.ones(5000))
    opt = front([w], state_dtype={"square_avg": "uint8"}, rounding="stochastic", seed=3)
    assert "state_dtype" not in opt.param_groups[0]
    found = opt.state_dtype, opt.rounding, opt.master_weight_bits, opt.seed
    assert found == ({"square_avg": "uint8"}, "stochastic", None, 3)
    again = pickle.loads(pickle.dumps(opt))
    assert (again.state_dtype, again.seed) == ({"square_avg": "uint8"}, 3)
    assert "rounding: stochastic" in repr(opt)
    with pytest.raises(AttributeError):
        opt.seed = 4


# --- checkpoints -------------------------------------------------------------------------------

STORAGES = ("float32", "bfloat16", "uint8")


@pytest.mark.parametrize("saved", STORAGES)
@pytest.mark.parametrize("loading", STORAGES)
@pytest.mark.parametrize("front", ["arrays", "torch"])
def test_any_storage_loads_into_any(saved, loading, front):
    """Equal storage bit for bit; other storage rounded as a step rounds, so without a bias."""
    numel = 9000

    def build(storage):
        if front == "arrays":
            w = normal(0, numel)
            return RMSprop([w], momentum=0.9, state_dtype=storage), None
        p = torch.nn.Parameter(torch.from_numpy(normal(0, numel)))
        return TorchRMSprop([p], momentum=0.9, state_dtype=storage), p

    def step(opt, p, seed):
        if p is None:
            return opt.step(grads=[normal(seed, numel)])
        p.grad = torch.from_numpy(normal(seed, numel))
        return opt.step()

    def wide(opt):
        entry = opt.float32_state(opt.state_dict())["state"][0]
        return {k: np.asarray(v) for k, v in entry.items() if k != "step"}

    opt, p = build(saved)
    for seed in range(3):
        step(opt, p, seed)
    other, q = build(loading)
    step(other, q, 9)
    other.load_state_dict(opt.state_dict())
    entry = other.state[0] if q is None else other.state[q]
    assert str(entry["square_avg"].dtype).removeprefix("torch.") == loading
    assert ("square_avg_scale" in entry) == (loading == "uint8")
    before, after = wide(opt), wide(other)
    if saved == loading or loading == "float32":
        assert bits(before) == bits(after)
    for key, x in before.items():
        assert abs(after[key].mean() - x.mean()) < 0.01 * np.abs(x).mean()
        assert np.abs(after[key] - x).max() <= np.abs(x).max() / 8
    step(other, q, 10)


def test_a_float32_checkpoint_for_torch():
    """Codes are nothing that torch's own RMSprop knows; `float32_state` is."""
    p = torch.nn.Parameter(torch.from_numpy(normal(0, 9000)))
    opt = TorchRMSprop([p], state_dtype="uint8")
    p.grad = torch.from_numpy(normal(1, 9000))
    opt.step()
    stock = torch.optim.RMSprop([p])
    stock.load_state_dict(TorchRMSprop.float32_state(opt.state_dict()))
    assert stock.state[p].keys() == {"step", "square_avg"}
    assert stock.state[p]["square_avg"].dtype == torch.float32
    stock.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wide_state_of_16_bit_parameters_comes_back_wide(dtype):
    """torch's base class would make it the parameter's type."""
    p = torch.nn.Parameter(torch.ones(100, dtype=dtype))
    opt = TorchRMSprop([p], momentum=0.9)
    p.grad = torch.full_like(p, 0.3)
    opt.step()
    again = TorchRMSprop([torch.nn.Parameter(p.detach().clone())], momentum=0.9)
    again.load_state_dict(opt.state_dict())
    (entry,), (own,) = again.state.values(), opt.state.values()
    assert {key: value.dtype for key, value in entry.items()} == dict.fromkeys(
        own, torch.float32
    )
    assert all(torch.equal(entry[key], own[key]) for key in own)
    stock = torch.optim.RMSprop([p], momentum=0.9)
    stock.step()
    again.load_state_dict(stock.state_dict())  # in torch it is the parameter's type
    (entry,) = again.state.values()
    assert entry["square_avg"].dtype == torch.float32


@pytest.mark.parametrize("saved", [24, 32, None])
@pytest.mark.parametrize("loading", [24, 32, None])
def test_master_bits_load_into_others(saved, loading):
    w = normal(0, 500).astype(BF16)
    opt = RMSprop([w], lr=0.01, master_weight_bits=saved)
    opt.step(grads=[normal(1, 500).astype(BF16)])
    other = RMSprop([w.copy()], master_weight_bits=loading)
    other.load_state_dict(opt.state_dict())
    assert ("error_bits" in other.state[0]) == (loading is not None)
    if saved is not None and loading is not None:
        full, loaded = opt.float32_params()[0], other.float32_params()[0]
        assert np.abs(full - loaded).max() <= (0 if loading >= saved else 2**-14)


def test_codes_without_scales_are_refused():
    opt = RMSprop([W32.copy()], state_dtype="uint8")
    opt.step(grads=[W32])
    checkpoint = opt.state_dict()
    before = bits(opt.state_dict()["state"])
    del checkpoint["state"][0]["square_avg_scale"]
    with pytest.raises(
        ValueError, match=r"square_avg_scale: expected float32 of shape \(20,\)"
    ):
        opt.load_state_dict(checkpoint)
    with pytest.raises(
        ValueError, match="state square_avg_scale of parameter 0: expected float32"
    ):
        opt.state[0]["square_avg_scale"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="expected float32 of shape"):
        opt.state[0]["square_avg"] = np.ones(3, np.float32)
    assert bits(opt.state_dict()["state"]) == before


@NARROW
def test_state_is_assigned_and_reset(storage):
    opt = RMSprop([W32.copy()], state_dtype=storage, initial_square_avg=1.0)
    assert (numbers(opt) == 1).all()
    opt.state[0]["square_avg"] = np.full(5000, 0.25, np.float32)
    assert (numbers(opt) == 0.25).all()
    del opt.state[0]
    assert (numbers(opt) == 1).all()


@NARROW
def test_save_and_load(storage, tmp_path):
    w = normal(0, 9000).astype(BF16)
    opt = RMSprop({"w": w}, lr=0.01, state_dtype=storage, master_weight_bits=24)
    opt.step(grads=[normal(1, 9000).astype(BF16)])
    rmsprop.save(tmp_path / "x.safetensors", opt)
    other = RMSprop({"w": np.zeros_like(w)}, state_dtype=storage, master_weight_bits=24)
    rmsprop.load(tmp_path / "x.safetensors", other)
    assert bits(other.state_dict()["state"]) == bits(opt.state_dict()["state"])
    assert bits(other.float32_params()) == bits(opt.float32_params())


def test_without_ml_dtypes_bfloat16_is_its_bits(monkeypatch):
    """The package is optional: torch's tensors come without it."""
    real = builtins.__import__

    def none(name, *args, **kwargs):
        if name == "ml_dtypes":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    opt = RMSprop([W32.copy()], state_dtype="bfloat16", initial_square_avg=1.0)
    opt.step(grads=[W32])
    wide = numbers(opt)
    monkeypatch.setattr(builtins, "__import__", none)
    assert opt.state[0]["square_avg"].dtype == np.uint16
    assert (numbers(opt) == wide).all()
    again = RMSprop([W32.copy()], state_dtype="bfloat16")
    again.load_state_dict(opt.state_dict())
    assert (numbers(again) == wide).all()


@NARROW
@pytest.mark.parametrize("front", [RMSprop, TorchRMSprop])
def test_converted_checkpoints_are_wide(storage, front):
    """Other frameworks know no codes."""
    options = {**rmsprop.dialect("timm"), "state_dtype": storage}
    if front is RMSprop:
        opt = RMSprop([W32.copy()], lr=0.1, **options)
        opt.step(grads=[W32])
    else:
        p = torch.nn.Parameter(torch.ones(5000))
        opt = TorchRMSprop([p], lr=0.1, **options)
        p.grad = torch.ones(5000)
        opt.step()
    checkpoint = rmsprop.convert.to_timm(opt.state_dict())
    found = np.asarray(checkpoint["state"][0]["square_avg"])
    wide = opt.float32_state(opt.state_dict())["state"][0]["square_avg"]
    assert found.dtype == np.float32
    assert bits(found) == bits(np.asarray(wide))


# --- averages of 16-bit parameters --------------------------------------------------------------


@pytest.mark.parametrize("front", [RMSprop, TorchRMSprop])
def test_averaged(front):
    w = normal(0, 300).astype(BF16)
    if front is RMSprop:
        opt = RMSprop([w], lr=0.1, ema_decay=0.5, master_weight_bits=32)
        opt.step(grads=[normal(1, 300).astype(BF16)])
        read = w.astype
        ema = opt.state[0]["ema"]
    else:
        p = torch.nn.Parameter(torch.from_numpy(w.view(np.int16)).view(torch.bfloat16))
        opt = TorchRMSprop([p], lr=0.1, ema_decay=0.5, master_weight_bits=32)
        p.grad = torch.from_numpy(normal(1, 300)).bfloat16()
        opt.step()
        read = w.astype  # the same memory
        ema = opt.state[p]["ema"].numpy()
    before = read(np.float32)
    with opt.averaged():
        assert (read(np.float32) == ema.astype(BF16).astype(np.float32)).all()
        assert (read(np.float32) != before).any()
    assert (read(np.float32) == before).all()
