"""Bad input raises before the first write and says what is wrong: the culprit, what was found, what was wanted.

The rows about checkpoints are in test_checkpoint.py, the rule of what overlaps in test_overlap.py.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided, sliding_window_view
from problems import bits, gradients_for, random_arrays
from producers import (
    COMPLEX,
    CUDA,
    IS_COPIED,
    READ_ONLY,
    Handmade,
    Legacy,
    Versioned,
    misaligned,
)
from rmsprop import Parameter, RMSprop, dialect

NAMES = ("fc.weight", "fc.bias")
SHAPES = ((6, 4), (5,))


class Row(NamedTuple):
    name: str
    exception: type[Exception] | tuple[type[Exception], ...]
    message: str  # a regular expression; case does not matter
    act: Callable


def rows(table):
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=row.name) for row in table]
    )


def raises(row):
    return pytest.raises(
        row.exception, match=re.compile(row.message, re.IGNORECASE | re.DOTALL)
    )


# --- parameters -------------------------------------------------------------------------------


def readonly(array):
    array.flags.writeable = False
    return array


class Pretender:
    """Says that it speaks DLPack, and does not."""

    def __dlpack__(self, **_):
        return 3

    def __dlpack_device__(self):
        return (1, 0)


FREED = (TypeError, ValueError)


def freed_tensor(numel):
    """As FSDP leaves its tensors between two uses: a shape, and no memory."""
    tensor = torch.ones(numel)
    tensor.untyped_storage().resize_(0)
    return tensor


def negated(numel):
    """A tensor whose memory holds the negative of its numbers."""
    return torch.conj(torch.view_as_complex(torch.ones(numel, 2))).imag


def retyped(dtype):
    return lambda a, b: [a, b.astype(dtype)]


def unsupported(found):
    return rf"parameter 1.*expected.*float32.*float64.*got.*{found}"


FORMS = [
    Row("string", TypeError, r"params.*got.*str", lambda a, b: "fc.weight"),
    Row("number", TypeError, r"params.*got.*float", lambda a, b: 0.5),
    Row("none", TypeError, r"params.*got.*None", lambda a, b: None),
    Row("bare array", TypeError, r"params", lambda a, b: a),
    Row("bare Parameter", TypeError, r"params", lambda a, b: Parameter(a)),
    Row("bare tensor", TypeError, r"params", lambda a, b: torch.from_numpy(a)),
    Row(
        "a string in a group",
        TypeError,
        r"parameter 1:.*got.*str",
        lambda a, b: [{"params": [a]}, {"params": ["b"]}],
    ),
    Row("none at all", ValueError, r"no parameters|at least one", lambda a, b: []),
    Row(
        "none in a generator",
        ValueError,
        r"no parameters|at least one",
        lambda a, b: iter(()),
    ),
    Row(
        "none in a mapping", ValueError, r"no parameters|at least one", lambda a, b: {}
    ),
    Row(
        "none in the groups",
        ValueError,
        r"no parameters|at least one",
        lambda a, b: [{"params": []}],
    ),
    Row(
        "duplicate name in two groups",
        ValueError,
        r"'w'",
        lambda a, b: [{"params": {"w": a}}, {"params": {"w": b}}],
    ),
    Row(
        "group without names",
        ValueError,
        r"parameter 1.*name",
        lambda a, b: [{"params": {"w": a}}, {"params": [b]}],
    ),
    Row(
        "same in two groups",
        ValueError,
        r"parameter 1.*parameter 0",
        lambda a, b: [{"params": [a]}, {"params": [a]}],
    ),
]

PARAMETERS = [
    Row("a string inside", TypeError, r"parameter 1:.*got.*str", lambda a, b: [a, "b"]),
    Row(
        "a number inside", TypeError, r"parameter 1:.*got.*float", lambda a, b: [a, 0.5]
    ),
    Row("None inside", TypeError, r"parameter 1:.*got.*None", lambda a, b: [a, None]),
    Row(
        "a named string",
        TypeError,
        r"parameter 1 \('b'\):.*got.*str",
        lambda a, b: {"a": a, "b": "b"},
    ),
    Row(
        "long double",
        TypeError,
        unsupported("longdouble|float128"),
        retyped("longdouble"),
    ),
    Row("integers", TypeError, unsupported("int32"), retyped("int32")),
    Row("booleans", TypeError, unsupported("bool"), retyped("bool")),
    Row("complex", TypeError, unsupported("complex64"), retyped("complex64")),
    Row("objects", TypeError, unsupported("object"), retyped("object")),
    Row(
        "DLPack complex",
        TypeError,
        unsupported("complex64"),
        lambda a, b: [a, Handmade(b.astype("complex64"), code=COMPLEX)],
    ),
    Row(
        "DLPack vectors",
        TypeError,
        r"parameter 1",
        lambda a, b: [a, Handmade(b, lanes=2)],
    ),
    Row(
        "buffer of integers", TypeError, r"parameter 1", lambda a, b: [a, bytearray(8)]
    ),
    Row("byte-swapped", TypeError, r"parameter 1.*(>f4|byte|endian)", retyped(">f4")),
    Row("duplicate name", ValueError, r"'w'", lambda a, b: [("w", a), ("w", b)]),
    Row(
        "duplicate Parameter.name",
        ValueError,
        r"'w'",
        lambda a, b: [Parameter(a, "w"), Parameter(b, "w")],
    ),
    Row(
        "Parameter without name",
        ValueError,
        r"parameter 1.*name",
        lambda a, b: [Parameter(a, "w"), Parameter(b)],
    ),
    Row(
        "read-only array",
        ValueError,
        r"parameter 1.*read-?only",
        lambda a, b: [a, readonly(b)],
    ),
    Row(
        "read-only buffer",
        ValueError,
        r"parameter 1.*read-?only",
        lambda a, b: [a, memoryview(b.tobytes()).cast("f")],
    ),
    Row(
        "read-only capsule",
        ValueError,
        r"parameter 1.*read-?only",
        lambda a, b: [a, Versioned(readonly(b))],
    ),
    Row(
        "read-only flag",
        ValueError,
        r"parameter 1.*read-?only",
        lambda a, b: [a, Handmade(b, flags=READ_ONLY)],
    ),
    Row(
        "copy",
        ValueError,
        r"parameter 1.*(read-?only|cop)",
        lambda a, b: [a, Handmade(b, flags=IS_COPIED)],
    ),
    Row(
        "legacy capsule",
        ValueError,
        r"parameter 1.*(read-?only|legacy)",
        lambda a, b: [a, Legacy(b)],
    ),
    Row(
        "JAX array",
        ValueError,
        r"parameter 1.*(read-?only|immutable|legacy)",
        lambda a, b: [a, jnp.asarray(b)],
    ),
    Row(
        "device",
        ValueError,
        r"parameter 1.*cuda:0",
        lambda a, b: [a, Handmade(b, device=CUDA)],
    ),
    Row(
        "second device",
        ValueError,
        r"parameter 1.*cuda:1",
        lambda a, b: [a, Handmade(b, device=(CUDA[0], 1))],
    ),
    Row("no capsule", TypeError, r"parameter 1:", lambda a, b: [a, Pretender()]),
    Row(
        "pending negation",
        ValueError,
        r"parameter 1.*negat",
        lambda a, b: [a, negated(5)],
    ),
    Row("freed tensor", FREED, r"parameter 1", lambda a, b: [a, freed_tensor(5)]),
    Row(
        "capsule of nothing",
        FREED,
        r"parameter 1",
        lambda a, b: [a, Handmade(b, has_data=False)],
    ),
    Row(
        "unknown DLPack version",
        ValueError,
        r"parameter 1.*version",
        lambda a, b: [a, Handmade(b, major=2)],
    ),
    Row(
        "more dimensions than NumPy has",
        ValueError,
        r"parameter 1.*64 dimensions.*65",
        lambda a, b: [a, Handmade(b, more_dims=64)],
    ),
    Row(
        "masked array",
        TypeError,
        r"parameter 1.*mask",
        lambda a, b: [a, np.ma.array(b, mask=[0, 1, 0, 0, 0])],
    ),
    Row(
        "masked array without a mask",
        TypeError,
        r"parameter 1.*mask",
        lambda a, b: [a, np.ma.array(b)],
    ),
    Row(
        "unaligned",
        ValueError,
        r"parameter 1.*align",
        lambda a, b: [a, misaligned(b, 2)],
    ),
    Row(
        "unaligned capsule",
        ValueError,
        r"parameter 1.*align",
        lambda a, b: [a, Handmade(misaligned(b, 2))],
    ),
    Row(
        "broadcast",
        ValueError,
        r"parameter 1.*(overlap|share)",
        lambda a, b: [a, as_strided(b, (3, 5), (0, 4))],
    ),
    Row(
        "sliding windows",
        ValueError,
        r"parameter 1.*(overlap|share)",
        lambda a, b: [a, sliding_window_view(b, 2, writeable=True)],
    ),
    Row("same twice", ValueError, r"parameter 1.*parameter 0", lambda a, b: [a, a]),
    Row(
        "same memory, named",
        ValueError,
        r"parameter 1 \('v'\).*parameter 0 \('w'\)",
        lambda a, b: {"w": a, "v": a.T},
    ),
    Row(
        "same memory through NumPy and torch",
        ValueError,
        r"parameter 1.*parameter 0",
        lambda a, b: [a, torch.from_numpy(a)],
    ),
    Row(
        "overlap",
        ValueError,
        r"parameter 2.*parameter 0",
        lambda a, b: [a.ravel()[:5], b, a[1:]],
    ),
    Row(
        "overlap of two dtypes",
        ValueError,
        r"parameter 1.*parameter 0",
        lambda a, b: [a.view("float64"), a.ravel()[1:2]],
    ),
]


@rows(FORMS + PARAMETERS)
def test_parameters(row):
    a, b = random_arrays(0, SHAPES)
    before = bits([a, b])
    params = row.act(a, b)
    with raises(row):
        RMSprop(params)
    assert bits([a, b]) == before


@rows(PARAMETERS)
def test_parameters_of_an_added_group(row):
    """`add_param_group` refuses what the constructor refuses, and nothing of the group stays."""
    first, a, b = random_arrays(0, [(3,), *SHAPES])
    is_named = "'" in row.message
    opt = RMSprop({"first": first} if is_named else [first])
    before = bits([first, a, b, opt.state_dict()])
    with pytest.raises(row.exception):
        opt.add_param_group({"params": row.act(a, b)})
    assert bits([first, a, b, opt.state_dict()]) == before


def test_plain_arrays_cannot_be_contiguous():
    with pytest.raises(
        ValueError, match=r"parameter 0: expected.*contiguous_params.*got ndarray"
    ):
        RMSprop(random_arrays(0, SHAPES), contiguous_params=True)


# --- options ----------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
NOT_NUMBERS = ("fast", None, [0.1], 1j)
AT_LEAST_0 = ("lr", "eps", "weight_decay", "momentum", "initial_square_avg")
OUT_OF_RANGE = [
    *((key, value) for key in AT_LEAST_0 for value in (-1.0, NAN, INF, -INF)),
    *(("alpha", value) for value in (-0.1, 1.1, NAN, INF)),
]
BAD_OPTIONS = [
    *((key, value, ValueError) for key, value in OUT_OF_RANGE),
    *(
        (key, value, TypeError)
        for key in (*AT_LEAST_0, "alpha")
        for value in NOT_NUMBERS
    ),
]
bad_options = pytest.mark.parametrize(("key", "value", "exception"), BAD_OPTIONS)


def about(culprit, value):
    found = re.escape(repr(value)) if isinstance(value, float) else ""
    return re.compile(
        rf"^{culprit}: expected a.* number.*, got.*{found}", re.IGNORECASE
    )


@bad_options
def test_option_in_the_constructor(key, value, exception):
    with pytest.raises(exception, match=about(key, value)):
        RMSprop(random_arrays(0, SHAPES), **{key: value})


@bad_options
def test_option_in_a_group(key, value, exception):
    a, b = random_arrays(0, SHAPES)
    with pytest.raises(exception, match=about(f"{key} of group 1", value)):
        RMSprop([{"params": [a]}, {"params": [b], key: value}])
    opt = RMSprop([a])
    before = bits([a, b, opt.state_dict()])
    with pytest.raises(exception, match=about(f"{key} of group 1", value)):
        opt.add_param_group({"params": [b], key: value})
    assert bits([a, b, opt.state_dict()]) == before


@bad_options
def test_option_changed_later(key, value, exception, contiguous):
    world = World(contiguous)
    before = world.bits()
    with pytest.raises(exception, match=about(f"{key} of group 1", value)):
        world.opt.param_groups[1][key] = value
        world.opt.step()
    assert world.bits() == before


@pytest.mark.parametrize("where", ["constructor", "group", "later"])
def test_alpha_of_1_with_bias_correction(where):
    a, b = random_arrays(0, SHAPES)
    with pytest.raises(ValueError, match=r"alpha.*(< 1|below 1).*got 1"):
        if where == "constructor":
            RMSprop([a], alpha=1.0, bias_correction=True)
        elif where == "group":
            RMSprop([{"params": [a], "alpha": 1.0}], bias_correction=True)
        else:
            opt = RMSprop([a], bias_correction=True)
            opt.param_groups[0]["alpha"] = 1.0
            opt.step(grads=[b])


@pytest.mark.parametrize(
    ("option", "value", "exception"),
    [
        ("max_grad_norm", 0.0, ValueError),
        ("max_grad_norm", -1.0, ValueError),
        ("max_grad_norm", NAN, ValueError),
        ("max_grad_norm", "small", TypeError),
        ("nonfinite", "ignore", ValueError),
        ("threads", 0, ValueError),
        ("threads", -1, ValueError),
    ],
)
def test_option_of_the_optimizer(option, value, exception):
    params = random_arrays(0, SHAPES)
    message = re.compile(f"{option}.*expected.*got.*{value}", re.IGNORECASE)
    with pytest.raises(exception, match=message):
        RMSprop(params, **{option: value})
    opt = RMSprop(params)
    before = getattr(opt, option)
    with pytest.raises(exception, match=message):
        setattr(opt, option, value)
    assert getattr(opt, option) == before
    with pytest.raises(ValueError, match=rf"{option}.*(optimizer|constructor)"):
        RMSprop([{"params": params, option: value}])


def test_unknown_dialect():
    with pytest.raises(ValueError, match=r"tensorflow.*tf1|tf1.*tensorflow"):
        dialect("tensorflow")


# --- steps ------------------------------------------------------------------------------------


class World:
    """Two named groups of one parameter each, after two good steps, with good gradients in place."""

    def __init__(self, contiguous):
        self.params = [
            Parameter(array, name)
            for array, name in zip(random_arrays(0, SHAPES), NAMES, strict=True)
        ]
        self.opt = RMSprop(
            [{"params": [param]} for param in self.params],
            momentum=0.9,
            centered=True,
            contiguous_params=contiguous,
        )
        self.grads = gradients_for(self.params, seed=1)
        for _ in range(2):
            self.opt.step(grads=self.grads)
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        self.arrays = [np.asarray(param) for param in self.params]

    def bits(self):
        return bits([self.arrays, self.grads, self.opt.state_dict()["state"]])


def step_with(grads):
    """A step whose gradients are made from the good ones."""
    return lambda world: world.opt.step(grads=grads(world))


def step_after(change):
    def act(world):
        change(world)
        world.opt.step()

    return act


WANTED = r"gradient 1 \('fc.bias'\): expected float32 of shape \(5,\), got "

GRADIENTS = [
    Row(
        "dtype",
        TypeError,
        rf"{WANTED}int64 of shape \(5,\)",
        lambda world: world.grads[1].astype("int64"),
    ),
    Row(
        "complex dtype",
        TypeError,
        rf"{WANTED}complex64 of shape \(5,\)",
        lambda world: world.grads[1].astype("complex64"),
    ),
    Row(
        "dtype and shape",
        TypeError,
        rf"{WANTED}int64 of shape \(1, 5\)",
        lambda world: world.grads[1].astype("int64")[None],
    ),
    Row(
        "shape of another floating dtype",
        ValueError,
        rf"{WANTED}float64 of shape \(1, 5\)",
        lambda world: world.grads[1].astype("float64")[None],
    ),
    Row(
        "shape",
        ValueError,
        rf"{WANTED}float32 of shape \(4,\)",
        lambda world: world.grads[1][:4],
    ),
    Row(
        "shape that would broadcast",
        ValueError,
        rf"{WANTED}float32 of shape \(\)",
        lambda world: np.array(1, "float32"),
    ),
    Row(
        "torch int32",
        TypeError,
        rf"{WANTED}int32 of shape \(5,\)",
        lambda world: torch.zeros(5, dtype=torch.int32),
    ),
    Row(
        "torch complex64",
        TypeError,
        rf"{WANTED}complex64 of shape \(5,\)",
        lambda world: torch.zeros(5, dtype=torch.complex64),
    ),
    Row(
        "byte-swapped",
        TypeError,
        r"gradient 1 \('fc.bias'\).*(>f4|byte|endian)",
        lambda world: world.grads[1].astype(">f4"),
    ),
    Row(
        "more dimensions than NumPy has",
        ValueError,
        r"gradient 1 \('fc.bias'\).*64 dimensions.*65",
        lambda world: Handmade(world.grads[1], more_dims=64),
    ),
    Row(
        "masked array",
        TypeError,
        r"gradient 1 \('fc.bias'\).*mask",
        lambda world: np.ma.array(world.grads[1], mask=[0, 1, 0, 0, 0]),
    ),
    Row(
        "masked array without a mask",
        TypeError,
        r"gradient 1 \('fc.bias'\).*mask",
        lambda world: np.ma.array(world.grads[1]),
    ),
    Row(
        "string",
        TypeError,
        r"gradient 1 \('fc.bias'\).*got.*str",
        lambda world: "gradient",
    ),
    Row(
        "pending negation",
        ValueError,
        r"gradient 1 \('fc.bias'\).*negat",
        lambda world: negated(5),
    ),
    Row(
        "number",
        ValueError,
        r"gradient 1 \('fc.bias'\): expected float32 of shape \(5,\), got float64 of shape \(\)",
        lambda world: 0.5,
    ),
    Row(
        "integer",
        TypeError,
        r"gradient 1 \('fc.bias'\).*got int",
        lambda world: 1,
    ),
    Row(
        "device",
        ValueError,
        r"gradient 1 \('fc.bias'\).*cuda:0",
        lambda world: Handmade(world.grads[1], device=CUDA),
    ),
    Row(
        "gradient is its own parameter",
        ValueError,
        r"gradient 1 \('fc.bias'\) overlaps parameter 1 \('fc.bias'\)",
        lambda world: world.arrays[1],
    ),
    Row(
        "gradient overlaps another parameter",
        ValueError,
        r"gradient 1 \('fc.bias'\) overlaps parameter 0 \('fc.weight'\)",
        lambda world: world.arrays[0].ravel()[3:8],
    ),
]

HANDED_OVER = {
    "by position": lambda world, grads: world.opt.step(grads=grads),
    "by name": lambda world, grads: world.opt.step(
        grads=dict(zip(NAMES, grads, strict=True))
    ),
    "as .grad": lambda world, grads: (
        setattr(world.params[1], "grad", grads[1]),
        world.opt.step(),
    ),
}


@pytest.mark.parametrize("hand_over", HANDED_OVER.values(), ids=HANDED_OVER)
@rows(GRADIENTS)
def test_gradient(row, hand_over, contiguous):
    """The second gradient is bad; the first, which is good, changes nothing either."""
    world = World(contiguous)
    before = world.bits()
    with raises(row):
        hand_over(world, [world.grads[0], row.act(world)])
    assert world.bits() == before


STEPS = [
    Row(
        "grads is an array",
        TypeError,
        r"grads",
        step_with(lambda world: np.zeros((2, 5))),
    ),
    Row("grads is a string", TypeError, r"grads", step_with(lambda world: "gb")),
    Row("grads is a number", TypeError, r"grads", step_with(lambda world: 2)),
    Row("too few", ValueError, r"2.*1|1.*2", step_with(lambda world: world.grads[:1])),
    Row(
        "too many",
        ValueError,
        r"2.*3|3.*2",
        step_with(lambda world: world.grads + [None]),
    ),
    Row(
        "too few in a generator",
        ValueError,
        r"2.*1|1.*2",
        step_with(lambda world: iter(world.grads[:1])),
    ),
    Row(
        "unknown name",
        ValueError,
        r"'head'",
        step_with(
            lambda world: {**dict(zip(NAMES, world.grads, strict=True)), "head": None}
        ),
    ),
    Row(
        "missing name",
        ValueError,
        r"'fc.bias'",
        step_with(lambda world: {"fc.weight": world.grads[0]}),
    ),
    Row(
        "resized",
        ValueError,
        r"\('fc.bias'\): expected.*\(5,\).*got.*\(4,\)",
        step_after(
            lambda world: setattr(world.params[1], "data", np.zeros(4, "float32"))
        ),
    ),
    Row(
        "resized with its gradient",
        ValueError,
        r"parameter 1 \('fc.bias'\): expected.*\(5,\).*got.*\(4,\)",
        step_after(
            lambda world: (
                setattr(world.params[1], "data", np.zeros(4, "float32")),
                setattr(world.params[1], "grad", np.zeros(4, "float32")),
            )
        ),
    ),
    Row(
        "retyped",
        TypeError,
        r"\('fc.bias'\): expected.*float32.*got.*float64",
        step_after(
            lambda world: setattr(world.params[1], "data", np.zeros(5, "float64"))
        ),
    ),
    Row(
        "made read-only",
        ValueError,
        r"\('fc.bias'\).*read-?only",
        step_after(
            lambda world: setattr(world.params[1], "data", readonly(np.zeros(5, "f4")))
        ),
    ),
    Row(
        "made to overlap",
        ValueError,
        r"parameter 1 \('fc.bias'\) overlaps parameter 0 \('fc.weight'\)",
        step_after(
            lambda world: setattr(world.params[1], "data", world.arrays[0].ravel()[:5])
        ),
    ),
    Row(
        "fewer parameters in a group",
        ValueError,
        r"group 1",
        step_after(lambda world: world.opt.param_groups[1].update(params=())),
    ),
]


@rows(STEPS)
def test_step(row, contiguous):
    world = World(contiguous)
    before = world.bits()
    with raises(row):
        row.act(world)
    assert world.bits() == before


def resize(array):
    array.resize(4, refcheck=False)


PLAIN = [
    Row(
        "no gradients",
        ValueError,
        r"parameter 0 \('fc.weight'\).*grads=",
        lambda opt, arrays, grads: opt.step(),
    ),
    Row(
        "resized",
        ValueError,
        r"\('fc.bias'\): expected.*\(5,\).*got.*\(4,\)",
        lambda opt, arrays, grads: (resize(arrays[1]), opt.step(grads=grads)),
    ),
    Row(
        "made read-only",
        ValueError,
        r"parameter 1 \('fc.bias'\).*read-?only",
        lambda opt, arrays, grads: (readonly(arrays[1]), opt.step(grads=grads)),
    ),
]


@rows(PLAIN)
def test_step_of_plain_arrays(row):
    arrays, grads = random_arrays(0, SHAPES), random_arrays(1, SHAPES)
    opt = RMSprop(dict(zip(NAMES, arrays, strict=True)), momentum=0.9)
    opt.step(grads=grads)
    before = bits([arrays[0], grads, opt.state_dict()]), arrays[1].tobytes()[:16]
    with raises(row):
        row.act(opt, arrays, grads)
    assert (
        bits([arrays[0], grads, opt.state_dict()]),
        arrays[1].tobytes()[:16],
    ) == before


FREED_LATER = """
import numpy as np, torch
from rmsprop import RMSprop
from test_bad_input import FREED, freed_tensor

def refuses(params, grads, free=lambda: None):
    opt = RMSprop(params)
    free()
    try:
        opt.step(grads=grads)
    except FREED as error:
        assert "1" in str(error), error
        assert opt.state[0]["step"] == 0
    else:
        raise AssertionError

good = np.ones(5, np.float32)
tensor = torch.ones(5)
refuses([good, good.copy()], [good.copy(), freed_tensor(5)])
refuses([good, tensor], [good.copy()] * 2, free=lambda: tensor.untyped_storage().resize_(0))
"""


def test_freed_tensors_do_not_crash(run_python):
    """A gradient, and a parameter that lost its memory between two steps."""
    run_python(FREED_LATER)


IMPOSSIBLE = """
import numpy as np
from producers import Handmade
from rmsprop import RMSprop

def refuses(action):
    try:
        action()
    except ValueError as error:
        assert "dimensions" in str(error), error
    else:
        raise AssertionError

for ndim in (65, 1000, 100_000, 2**31 - 1, -1):
    array = np.ones((2, 3, 1, 1), np.float32)
    made = Handmade(array, ndim=ndim)
    refuses(lambda: RMSprop([made]))
    opt = RMSprop([array])
    refuses(lambda: opt.step(grads=[made]))
    assert (array == 1).all() and opt.state[0]["step"] == 0
    assert made.handed_out == made.given_back > 0
"""


def test_more_dimensions_than_there_can_be_do_not_crash(run_python):
    """The lengths are not even read: there are fewer of them."""
    run_python(IMPOSSIBLE)


def test_gradients_by_name_need_names():
    arrays, grads = random_arrays(0, SHAPES), random_arrays(1, SHAPES)
    opt = RMSprop(arrays)
    before = bits([arrays, opt.state_dict()])
    with pytest.raises(ValueError, match="name"):
        opt.step(grads=dict(zip(NAMES, grads, strict=True)))
    assert bits([arrays, opt.state_dict()]) == before
