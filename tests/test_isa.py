"""Every instruction set gives the same bits; `RMSPROP_ISA` chooses, and refuses what is not there."""

import hashlib
import itertools
import platform
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import rmsprop
from problems import bits, wild_array

FLAGS = {"scalar": None, "sse2": "sse2", "avx2": "avx2", "avx512": "avx512f"}
OPTIONS = {
    "centered": (False, True),
    "momentum": (0.0, 0.9),
    "nesterov": (False, True),
    "eps_in_sqrt": (False, True),
    "lr_in_momentum": (False, True),
    "weight_decay": (0.0, 0.01),
    "decoupled_weight_decay": (False, True),
    "bias_correction": (False, True),
    "maximize": (False, True),
}
CAUTIOUS = {
    "weight_decay": 0.01,
    "decoupled_weight_decay": True,
    "cautious_weight_decay": True,
}
LENGTHS = (*range(35), 63, 64, 65, 127, 200, 500, 1000, 5000)


@cache
def arrays(seed, dtype):
    return [wild_array((seed, numel), numel, dtype) for numel in LENGTHS]


def digest(dtype, **options):
    params = [array.copy() for array in arrays(0, dtype)]
    opt = rmsprop.RMSprop(params, lr=0.1, **options)
    for seed in (1, 2, 3):
        opt.step(grads=arrays(seed, dtype))
    return hashlib.sha256(
        repr(bits([params, opt.state_dict()["state"]])).encode()
    ).hexdigest()


def print_digests():
    print(rmsprop.info()["isa"])
    for dtype, *chosen in itertools.product(("float32", "float64"), *OPTIONS.values()):
        options = dict(zip(OPTIONS, chosen, strict=True))
        print(dtype, options, digest(dtype, **options))
    later = {
        "centered": (False, True),
        "momentum": (0.0, 0.9),
        "nesterov": (False, True),
    }
    for dtype, *chosen in itertools.product(("float32", "float64"), *later.values()):
        options = dict(zip(later, chosen, strict=True))
        for decay in ({}, CAUTIOUS):
            every = {**options, **decay, "clip_weights": 0.5, "ema_decay": 0.9}
            print(dtype, every, digest(dtype, **every))
    codes = {"square_avg": "uint8", "momentum_buffer": "uint8", "ema": "bfloat16"}
    rounded = {"rounding": "stochastic", "momentum": 0.9, "ema_decay": 0.9, "seed": 3}
    for dtype in ("float16", ml_dtypes.bfloat16, "float32"):
        for bits_of_master in (None, 24, 32):
            if dtype == "float16" and bits_of_master:
                continue
            stored = {"state_dtype": codes, "master_weight_bits": bits_of_master}
            every = {**rounded, **stored}
            print(dtype, every, digest(dtype, **every))
            print(
                dtype, bits_of_master, digest(dtype, master_weight_bits=bits_of_master)
            )
    big = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    opt = rmsprop.RMSprop([np.zeros_like(big)], max_grad_norm=1.0)
    opt.step(grads=[big])
    print(opt.last_grad_norm.hex())


def available():
    """The instruction sets of this processor, as Linux tells them."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["scalar"]
    flags = Path("/proc/cpuinfo").read_text().split()
    return [name for name, flag in FLAGS.items() if flag is None or flag in flags]


def test_same_bits(run_python):
    code = "import test_isa; test_isa.print_digests()"
    printed = {
        isa: run_python(code, RMSPROP_ISA=isa).splitlines() for isa in available()
    }
    for isa, (used, *digests) in printed.items():
        assert used == isa
        assert digests == printed["scalar"][1:]


def test_best_is_chosen(run_python):
    code = "import os; os.environ.pop('RMSPROP_ISA', None); import rmsprop; print(rmsprop.info()['isa'])"
    assert run_python(code).strip() == available()[-1]


@pytest.mark.parametrize("name", ["mmx", "AVX2 ", "neon"])
def test_unknown_is_refused(name, run_python):
    code = f"""
try:
    import rmsprop
except ImportError as error:
    assert "RMSPROP_ISA" in str(error) and {name!r} in str(error), error
else:
    raise AssertionError
"""
    run_python(code, RMSPROP_ISA=name)


def test_info():
    info = rmsprop.info()
    assert info["version"] == rmsprop.__version__
    assert info["isa"] in FLAGS or platform.machine() not in ("x86_64", "AMD64")
    assert info["threads"] >= 1
    assert {"version", "isa", "threads", "features"} <= set(info)
