"""The caller's floating-point mode holds on every thread of a step, and a step changes nobody's mode."""

import ctypes
import functools
import platform
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from oracle import Oracle
from rmsprop import RMSprop

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="sets the mode through MXCSR"
)

NUMEL = 2_000_000
FLUSH_TO_ZERO, DENORMALS_ARE_ZERO = 1 << 15, 1 << 6
DOWN, UP, TOWARDS_ZERO = 1 << 13, 2 << 13, 3 << 13
STICKY = 0x3F  # the exceptions seen so far, which are no mode
MODES = {
    "default": 0,
    "flush to zero": FLUSH_TO_ZERO | DENORMALS_ARE_ZERO,
    "down": DOWN,
    "up": UP,
    "towards zero": TOWARDS_ZERO,
    "up, flush to zero": UP | FLUSH_TO_ZERO | DENORMALS_ARE_ZERO,
}
libm = ctypes.CDLL("libm.so.6")


class Environment(ctypes.Structure):
    """glibc's fenv_t on x86-64: the x87 part and the SSE register."""

    _fields_ = (("x87", ctypes.c_uint32 * 7), ("mxcsr", ctypes.c_uint32))


def environment():
    found = Environment()
    assert libm.fegetenv(ctypes.byref(found)) == 0
    return found


def mode():
    return environment().mxcsr & ~STICKY


@contextmanager
def mode_set(flags):
    kept, wanted = environment(), environment()
    wanted.mxcsr |= flags
    libm.fesetenv(ctypes.byref(wanted))
    try:
        yield
        assert mode() == wanted.mxcsr & ~STICKY
    finally:
        libm.fesetenv(ctypes.byref(kept))


OPTIONS = {"momentum": 0.9, "centered": True, "weight_decay": 0.01, "lr": 0.1}


def small_numbers(seed):
    """Numbers around the least normal one, whose sums and products round and underflow."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(NUMEL) * 10.0 ** rng.uniform(-42, -16, NUMEL)).astype(
        np.float32
    )


PARAM, GRAD = small_numbers(0), small_numbers(1)


def by_numpy(flags, param, grad, **options):
    """What NumPy, on this thread and in that mode, makes of the rule; one step."""
    with mode_set(flags):
        oracle = Oracle([param.copy()], **options)
        oracle.step([grad])
    return oracle.params[0].tobytes()


@functools.cache
def expected(flags):
    return by_numpy(flags, PARAM, GRAD, **OPTIONS)


def stepped(flags, threads):
    param = PARAM.copy()
    with mode_set(flags):
        RMSprop([param], threads=threads, **OPTIONS).step(grads=[GRAD])
    return param.tobytes()


def test_modes_differ():
    assert len({expected(flags) for flags in MODES.values()}) == len(MODES)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MODES)
def test_the_plain_rule_rounds_as_the_mode_says(name, dtype):
    """Of ordinary numbers, whose square roots may be computed in another way."""
    rng = np.random.default_rng(2)
    param, grad = rng.standard_normal((2, NUMEL), dtype=dtype)
    wanted = by_numpy(MODES[name], param, grad, lr=0.1)
    with mode_set(MODES[name]):
        RMSprop([param], lr=0.1).step(grads=[grad])
    assert param.tobytes() == wanted


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", MODES)
def test_the_callers_mode_holds_on_every_thread(name, threads):
    assert stepped(MODES[name], threads) == expected(MODES[name])


@pytest.mark.parametrize("name", MODES)
def test_nobody_keeps_the_mode(name):
    """One pool serves steps in one mode after steps in another."""
    param = PARAM.copy()
    opt = RMSprop([param], threads=3, **OPTIONS)
    for flags in (0, MODES[name], 0):
        param[...] = PARAM
        opt.state.clear()
        with mode_set(flags):
            opt.step(grads=[GRAD])
        assert param.tobytes() == expected(flags)


def test_callers_in_two_modes_at_once():
    flags = list(MODES.values())[1:4]
    for one in flags:
        expected(one)
    results = {}

    def run(one):
        results[one] = [stepped(one, threads=2) for _ in range(4)]

    threads = [threading.Thread(target=run, args=[one]) for one in flags]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {one: [expected(one)] * 4 for one in flags}


def test_a_failed_step_leaves_the_mode():
    with mode_set(UP), pytest.raises(ValueError):
        RMSprop([PARAM.copy()]).step(grads=[GRAD[1:]])
