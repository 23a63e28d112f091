"""Small seeded problems for the tests, and the bits of what comes out of them."""

from collections.abc import Mapping

import numpy as np
import rmsprop
from hypothesis import strategies as st

SHAPES = ((7, 5), (11,), (), (2, 3, 4))
NAMES = ("conv.weight", "conv.bias", "scale", "fc.weight")


def random_arrays(seed, shapes=SHAPES, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [np.array(rng.standard_normal(shape), dtype) for shape in shapes]


#: Options that switch each line of the rule on or off, for hypothesis.
LINES_OF_THE_RULE = {
    "momentum": st.sampled_from([0.0, 0.9]),
    "nesterov": st.booleans(),
    "centered": st.booleans(),
    "weight_decay": st.sampled_from([0.0, 0.01]),
    "decoupled_weight_decay": st.booleans(),
    "bias_correction": st.booleans(),
    "clip_weights": st.sampled_from([None, 0.5]),
    "ema_decay": st.sampled_from([None, 0.9]),
    "initial_square_avg": st.sampled_from([0.0, 1.0]),
}

SPECIAL = (0, -0.0, 1, np.nan, np.inf, -np.inf, 1e-40, -1e-45, 3e38, -1e30, 1e-20)


def wild_array(seed, shape, dtype):
    """Numbers of every magnitude, one in ten of them special; subnormal and huge for float32."""
    rng = np.random.default_rng(seed)
    drawn = np.array(rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 6, shape))
    special = rng.random(shape) < 0.1
    drawn[special] = rng.choice(SPECIAL, np.count_nonzero(special))
    return drawn.astype(dtype)


def random_parameters(seed, shapes=SHAPES, dtype=np.float32):
    """Parameters without names; each has a gradient."""
    params = [rmsprop.Parameter(array) for array in random_arrays(seed, shapes, dtype)]
    set_gradients(params, seed + 1)
    return params


def set_gradients(params, seed):
    for param, grad in zip(params, gradients_for(params, seed), strict=True):
        param.grad = grad


def gradients_for(params, seed):
    arrays = [np.asarray(param) for param in params]
    return [
        random_arrays((seed, index), [array.shape], array.dtype)[0]
        for index, array in enumerate(arrays)
    ]


def train(opt, params, seeds):
    for seed in seeds:
        set_gradients(params, seed)
        opt.step()


def bits(tree):
    """Equal for two trees of arrays exactly when every bit is, except that all NaNs are one."""
    if isinstance(tree, Mapping):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(value) for value in tree]
    if tree is None or isinstance(tree, str):
        return tree
    array = np.asarray(tree)
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
    return array.dtype.str, array.shape, array.tobytes()


def snapshot(opt):
    """Every bit an optimizer holds and owns: its parameters, state and options."""
    params = [param for group in opt.param_groups for param in group["params"]]
    return bits({"params": params, **opt.state_dict()})
