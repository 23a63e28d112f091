"""`contiguous_params=True` changes speed only: the same numbers, checkpoints and behaviour as False.

The other files run each of their promises with both values; here both take the same random walk.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import bits, gradients_for, random_arrays, snapshot
from rmsprop import Parameter, RMSprop

SHAPES = ((7, 5), (11,), (), (0, 3), (2, 3, 4), (6,))
DTYPES = ("float32", "float32", "float32", "float64", "float64", "float32")


def fresh(seed=0):
    """Parameters of both dtypes in Fortran order; one is empty, half have a gradient."""
    params = [
        Parameter(np.array(random_arrays((seed, index), [shape], dtype)[0], order="F"))
        for index, (shape, dtype) in enumerate(zip(SHAPES, DTYPES, strict=True))
    ]
    for param in params[::2]:
        param.grad = np.full(param.shape, 0.5, param.dtype)
    return params


class Walk:
    """One optimizer and everything a training loop may do between two steps."""

    def __init__(self, contiguous):
        self.params = fresh()
        self.opt = RMSprop(
            self.params, weight_decay=0.1, momentum=0.9, contiguous_params=contiguous
        )

    def step(self, _):
        self.opt.step()

    def step_with_grads(self, seed):
        self.opt.step(grads=gradients_for(self.params, seed))

    def write_gradients(self, seed):
        """Accumulates in place, as a backward pass does; creates what is missing."""
        for param, new in zip(
            self.params, gradients_for(self.params, seed), strict=True
        ):
            if param.grad is None:
                param.grad = new
            else:
                param.grad += new

    def replace_gradient(self, seed):
        index = seed % len(self.params)
        self.params[index].grad = gradients_for(self.params, seed)[index]

    def drop_gradient(self, seed):
        self.params[seed % len(self.params)].grad = None

    def share_gradient(self, _):
        """One parameter's gradient is a part of another's."""
        if self.params[1].grad is not None:
            self.params[5].grad = self.params[1].grad[:6]

    def zero_gradients(self, seed):
        self.opt.zero_grad(set_to_none=bool(seed % 2))

    def write_parameter(self, seed):
        self.params[seed % len(self.params)].data[...] = 0.25

    def replace_data(self, seed):
        index = seed % len(self.params)
        self.params[index].data = gradients_for(self.params, seed)[index]

    def add_group(self, seed):
        added = fresh(seed)
        self.opt.add_param_group({"params": added, "lr": 0.1})
        self.params += added

    def change_option(self, seed):
        self.opt.param_groups[-1]["centered"] = bool(seed % 2)

    def clip(self, _):
        self.opt.param_groups[0].update(clip_grad_max_norm=0.5, clip_grad_norm_type=2.0)
        self.opt.clip_grad()

    def reload(self, _):
        self.opt.load_state_dict(self.opt.state_dict())


ACTIONS = [name for name in vars(Walk) if not name.startswith("_")]


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 20)), max_size=12))
def test_the_same_walk(walk):
    separate, contiguous = Walk(contiguous=False), Walk(contiguous=True)
    for action, seed in [*walk, ("step", 0)]:
        for one in (separate, contiguous):
            getattr(one, action)(seed)
        assert gradients(contiguous) == gradients(separate)
        assert without_flag(contiguous) == without_flag(separate)


def gradients(walk):
    return bits([param.grad for param in walk.params])


def without_flag(walk):
    """Everything but the option itself."""
    saved = {"last_grad_norm": walk.opt.last_grad_norm, **snapshot(walk.opt)}
    for group in saved["param_groups"]:
        group.pop("contiguous_params", None)
    return saved


def test_parameters_of_one_dtype_share_one_buffer():
    params = fresh()
    before = bits(params)
    RMSprop(params, contiguous_params=True)
    assert bits(params) == before
    for dtype in ("float32", "float64"):
        datas = [param.data for param in params if param.dtype == dtype]
        starts = [data.ctypes.data for data in datas]
        extent = max(starts) - min(starts)
        assert extent <= sum(data.nbytes for data in datas) + 64 * len(datas)


def test_gradients_present_at_construction_keep_their_values():
    params = fresh()
    before = bits([param.grad for param in params])
    RMSprop(params, contiguous_params=True)
    assert bits([param.grad for param in params]) == before


def test_norm_of_millions_is_the_same():
    """Though the chunks it is summed in may not end where parameters do."""
    arrays = random_arrays(0, [(1000, 700), (3,), (800_001,)])
    norms = set()
    for contiguous in (False, True):
        params = [Parameter(np.array(array, order="F")) for array in arrays]
        opt = RMSprop(params, max_grad_norm=1.0, contiguous_params=contiguous)
        opt.step(grads=arrays)
        norms.add(opt.last_grad_norm)
    assert len(norms) == 1


def test_checkpoints_are_the_same(contiguous):
    """The buffers are not in the state: it has each parameter's own shape."""
    params = fresh()
    state = RMSprop(params, contiguous_params=contiguous).state_dict()["state"]
    assert [entry["square_avg"].shape for entry in state.values()] == list(SHAPES)


@pytest.mark.parametrize("count", [1, 1000])
def test_many_parameters(count):
    arrays, grads = random_arrays(0, [(5,)] * count), random_arrays(1, [(5,)] * count)
    params = [Parameter(array.copy()) for array in arrays]
    for opt in (RMSprop(arrays), RMSprop(params, contiguous_params=True)):
        for _ in range(3):
            opt.step(grads=grads)
    assert bits(params) == bits(arrays)
