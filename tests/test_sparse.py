"""Gradients of rows: only these are touched, as a step of them alone would; given more than once they are summed in order; bad ones are refused before the first write."""

import ml_dtypes
import numpy as np
import oracle
import pytest
import rmsprop
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import LINES_OF_THE_RULE, bits
from rmsprop import Parameter, RMSprop
from rmsprop.torch import RMSprop as TorchRMSprop
from torch import nn

OPTIONS = st.fixed_dictionaries({}, optional=LINES_OF_THE_RULE)


def normal(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def given_rows(seed, rows, count, row, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.integers(0, rows, count), rng.standard_normal((count, *row)).astype(
        dtype
    )


def summed(indices, values, dtype=np.float32):
    """Rows that were given, ascending, and what each was given, added left to right."""
    sums = {}
    for index, value in zip(indices.tolist(), values.astype(dtype)):
        sums[index] = sums[index] + value if index in sums else value
    rows = sorted(sums)
    shape = (len(rows), *values.shape[1:])
    return rows, np.array([sums[row] for row in rows], dtype).reshape(shape)


@given(
    options=OPTIONS,
    dtype=st.sampled_from([np.float32, np.float64]),
    rows=st.sampled_from([1, 3, 50]),
    row=st.sampled_from([(), (1,), (7,), (4, 5), (0,), (700,)]),
    count=st.integers(0, 40),
    layout=st.sampled_from(["C", "F", "strided"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_as_a_step_of_these_rows(options, dtype, rows, row, count, layout, seed):
    """The oracle steps the rows that were given, and the rest stays."""
    start = normal(seed, (rows, *row), dtype)
    p = start.copy(order="F" if layout == "F" else "C")
    if layout == "strided":
        p = np.zeros((rows, 2, *row), dtype)[:, 0]
        p[...] = start
    opt = RMSprop([p], lr=0.1, **options)
    whole = start.copy()
    o = oracle.Options(lr=0.1, **options)
    state = oracle.initial_state(whole, o)
    if o.ema_decay is not None:
        state["ema"] = whole.copy()
    for step in range(3):
        indices, values = given_rows((seed, step), rows, count, row, dtype)
        opt.step(grads=[(indices, values)])
        touched, g = summed(indices, values, dtype)
        part = {k: v if k == "step" else v[touched] for k, v in state.items()}
        w = whole[touched]
        oracle.update(w, g, part, o)
        whole[touched] = w
        for key, value in part.items():
            if key == "step":
                state[key] = value
            else:
                state[key][touched] = value
    assert bits(np.ascontiguousarray(p)) == bits(whole)
    found = {
        k: v if k == "step" else np.ascontiguousarray(v)
        for k, v in opt.state[0].items()
    }
    assert bits(found) == bits({k: state[k] for k in found})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "storage", [{}, {"state_dtype": "bfloat16"}, {"master_weight_bits": 32}]
)
def test_16_bit_parameters(dtype, storage):
    """Untouched rows keep their bits, touched ones are those of a dense gradient, with the same random bits."""
    if dtype == "float16" and "master_weight_bits" in storage:
        return
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    options = {"lr": 0.01, "rounding": "stochastic", "seed": 3, **storage}
    start = normal(0, (300, 40)).astype(dtype)
    p, q = start.copy(), start.copy()
    opt, dense = RMSprop([p], **options), RMSprop([q], **options)
    rows = np.unique(np.random.default_rng(1).integers(0, 300, 100))
    for step in range(3):
        values = normal((1, step), (len(rows), 40)).astype(dtype)
        g = np.zeros_like(q)
        g[rows] = values
        opt.step(grads=[(rows[::-1], values[::-1])])
        dense.step(grads=[g])
    others = np.setdiff1d(np.arange(300), rows)
    assert bits(p[rows]) == bits(q[rows])
    assert bits(p[others]) == bits(start[others])
    for key, value in opt.state[0].items():
        if key != "step":
            assert bits(value[rows]) == bits(dense.state[0][key][rows])


def test_many_rows_on_threads():
    indices, values = given_rows(1, 5000, 20_000, (64,))
    ends = []
    for threads in (1, 2, 3):
        p = normal(0, (5000, 64))
        opt = RMSprop([p], threads=threads, momentum=0.9)
        opt.step(grads=[(indices, values)])
        ends.append(bits([p, opt.state_dict()["state"]]))
    assert ends[0] == ends[1] == ends[2]


def test_norm_and_nonfinite_look_at_the_sums():
    p, b = normal(0, (10, 3)), np.zeros(2, np.float32)
    indices = np.array([4, 1, 4])
    values = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.float32)
    opt = RMSprop([p, b], max_grad_norm=1.0, nonfinite="skip")
    opt.step(grads=[(indices, values), np.ones(2, np.float32)])
    wanted = np.sqrt(16 + 25 + 36 + 64 + 100 + 144 + 2)
    assert abs(opt.last_grad_norm - wanted) < 1e-5
    before = bits([p, opt.state_dict()["state"]])
    values[0, 0], values[2, 0] = np.inf, -np.inf
    opt.step(grads=[(indices, values), np.ones(2, np.float32)])
    assert opt.skipped_steps == 1
    assert bits([p, opt.state_dict()["state"]]) == before


def test_steps_count_without_rows():
    p = normal(0, (10, 3))
    opt = RMSprop([p])
    before = bits(p)
    opt.step(grads=[([], np.zeros((0, 3), np.float32))])
    assert opt.state[0]["step"] == 1
    assert bits(p) == before
    assert RMSprop.support_sparse is True


def test_as_grad_of_a_parameter():
    p = Parameter(normal(0, (10, 3)))
    opt = RMSprop([p], contiguous_params=True)
    p.grad = (np.array([2]), np.ones((1, 3), np.float32))
    opt.step()
    assert (p.data != normal(0, (10, 3))).any(axis=1).tolist() == [
        i == 2 for i in range(10)
    ]
    opt.zero_grad()
    assert p.grad is None


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "int32", "uint32", "uint64"]
)
def test_indices_of_any_integer_type(dtype):
    p, q = normal(0, (10, 3)), normal(0, (10, 3))
    values = normal(1, (2, 3))
    RMSprop([p]).step(grads=[(np.array([7, 3], dtype), values)])
    RMSprop([q]).step(grads=[([7, 3], torch.from_numpy(values))])
    assert bits(p) == bits(q)
    assert bits(p) != bits(normal(0, (10, 3)))


VALUES = np.ones((2, 3), np.float32)
BAD = [
    ((np.array([0.0, 1.0]), VALUES), TypeError, "expected indices of rows as integers"),
    (
        (np.array([True, False]), VALUES),
        TypeError,
        "expected indices of rows as integers",
    ),
    ((np.array([[0, 1]]), VALUES), ValueError, "in one dimension, got 2 dimensions"),
    (
        (np.array([0, 10]), VALUES),
        ValueError,
        "expected indices from 0 to 9, got 10 at 1",
    ),
    (
        (np.array([-1, 0]), VALUES),
        ValueError,
        "expected indices from 0 to 9, got -1 at 0",
    ),
    (
        (np.array([0, 2**63], np.uint64), VALUES),
        ValueError,
        "expected indices from 0 to 9",
    ),
    (
        (np.array([0]), VALUES),
        ValueError,
        r"expected values of shape \(1, 3\) for so many indices, got \(2, 3\)",
    ),
    ((np.array([0, 1]), VALUES[:, :2]), ValueError, r"got \(2, 2\)"),
    ((np.array([0, 1]), VALUES.astype(int)), TypeError, "expected float32 of shape"),
    (
        (np.array([0, 1]), VALUES.astype(complex)),
        TypeError,
        "expected float32 of shape",
    ),
    (
        (np.array([0, 1]), None),
        TypeError,
        "expected a pair of indices of rows and values",
    ),
    ((np.array([0, 1]), VALUES, 3), ValueError, "got a tuple of 3"),
]


@pytest.mark.parametrize(("grad", "error", "match"), BAD, ids=lambda x: str(x)[:30])
def test_bad_rows(grad, error, match):
    p, first = normal(0, (10, 3)), np.ones(2, np.float32)
    opt = RMSprop([("b", first), ("emb", p)])
    before = bits([p, first, opt.state_dict()["state"]])
    with pytest.raises(error, match=rf"gradient 1 \('emb'\): .*{match}"):
        opt.step(grads=[np.ones(2, np.float32), grad])
    assert bits([p, first, opt.state_dict()["state"]]) == before


def test_what_has_no_rows():
    opt = RMSprop([np.ones((), np.float32)])
    with pytest.raises(
        ValueError,
        match="gradient 0: expected a gradient of a parameter with dimensions",
    ):
        opt.step(grads=[([0], np.ones(1, np.float32))])
    opt = RMSprop([np.ones((5000, 2), np.float32)], state_dtype="uint8")
    with pytest.raises(
        ValueError, match="gradient 0: expected a dense gradient with state in uint8"
    ):
        opt.step(grads=[([0], np.ones((1, 2), np.float32))])
    opt = RMSprop(
        [np.ones((5, 2), np.float32)], state_dtype="uint8"
    )  # which stays wide
    opt.step(grads=[([0], np.ones((1, 2), np.float32))])


# --- torch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "centered": True}, {"ema_decay": 0.9}]
)
def test_embeddings(options):
    """Both fronts, and duplicates as torch leaves them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.EmbeddingBag(50, 8, sparse=True, mode="sum"), nn.Linear(8, 1)
    )
    opt = TorchRMSprop(net.parameters(), lr=0.01, **options)
    arrays = [p.detach().numpy().copy() for p in net.parameters()]
    other = RMSprop(arrays, lr=0.01, eps_in_sqrt=False, lr_in_momentum=False, **options)
    for step in range(4):
        opt.zero_grad()
        words = torch.from_numpy(np.random.default_rng(step).integers(0, 50, (6, 5)))
        net(words).square().sum().backward()
        grads = [p.grad for p in net.parameters()]
        assert not grads[0].is_coalesced()
        rows = grads[0]._indices()[0].numpy(), grads[0]._values().numpy()
        other.step(grads=[rows, *(g.numpy() for g in grads[1:])])
        opt.step()
    assert bits([p.detach().numpy() for p in net.parameters()]) == bits(arrays)
    for index, p in enumerate(net.parameters()):
        for key, value in opt.state[p].items():
            assert bits(np.asarray(value)) == bits(
                np.asarray(other.state[index][key], value.numpy().dtype)
            )


def test_touched_rows_are_those_of_torchs_dense_step():
    """Without momentum and decay, a row that is touched is stepped as with a dense gradient."""
    ours, theirs = nn.Embedding(20, 4, sparse=True), nn.Embedding(20, 4)
    theirs.load_state_dict(ours.state_dict())
    opt, stock = (
        TorchRMSprop(ours.parameters()),
        torch.optim.RMSprop(theirs.parameters()),
    )
    rows = torch.tensor([3, 7, 3, 11])
    for _ in range(3):
        for net, each in ((ours, opt), (theirs, stock)):
            each.zero_grad()
            (net(rows) ** 3).sum().backward()
            each.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=3e-7, atol=3e-7)
    sparse_adam = torch.optim.SparseAdam(
        ours.parameters()
    )  # takes the very same gradients
    sparse_adam.step()


def test_steps_in_backward():
    ours, after = nn.Embedding(20, 4, sparse=True), nn.Embedding(20, 4, sparse=True)
    after.load_state_dict(ours.state_dict())
    opt, other = TorchRMSprop(ours.parameters()), TorchRMSprop(after.parameters())
    rows = torch.tensor([3, 7, 3, 11])
    with opt.step_in_backward():
        (ours(rows) ** 3).sum().backward()
    (after(rows) ** 3).sum().backward()
    other.step()
    assert torch.equal(ours.weight, after.weight)


def unchecked(indices, values, shape):
    with torch.sparse.check_sparse_tensor_invariants(False):
        return torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)


BAD_TENSORS = [
    (
        lambda: unchecked([[0, 12]], torch.ones(2, 3), (10, 3)),
        ValueError,
        "indices from 0 to 9, got 12",
    ),
    (
        lambda: unchecked([[-1, 2]], torch.ones(2, 3), (10, 3)),
        ValueError,
        "indices from 0 to 9, got -1",
    ),
    (
        lambda: torch.ones(10, 3).to_sparse(),
        ValueError,
        "gradient of rows, got one with 2 sparse",
    ),
]


@pytest.mark.parametrize(
    ("make", "error", "match"), BAD_TENSORS, ids=["12", "-1", "2 sparse"]
)
def test_bad_tensors(make, error, match):
    p, b = nn.Parameter(torch.ones(10, 3)), nn.Parameter(torch.ones(2))
    opt = TorchRMSprop([("b", b), ("emb", p)])
    p.grad, b.grad = make(), torch.ones(2)
    with pytest.raises(error, match=rf"gradient 1 \('emb'\): expected .*{match}"):
        opt.step()
    assert not opt.state
    assert bool((b == 1).all())
    assert bool((p == 1).all())


def test_uint8_state_and_rows():
    p = nn.Parameter(torch.ones(5000, 2))
    opt = TorchRMSprop([p], state_dtype="uint8")
    p.grad = torch.sparse_coo_tensor(
        [[1]], torch.ones(1, 2), (5000, 2), check_invariants=True
    )
    with pytest.raises(
        ValueError, match="gradient 0: expected a dense gradient with state in uint8"
    ):
        opt.step()
    assert not opt.state
    assert rmsprop.RMSprop.support_sparse


def test_the_average_of_rows_begins_as_the_full_values():
    """Of master bits too, and in both fronts; with dense steps before and rows after."""
    w = normal(0, (300, 4)).astype(ml_dtypes.bfloat16)
    p = nn.Parameter(torch.from_numpy(w.view(np.int16).copy()).view(torch.bfloat16))
    options = {"lr": 0.01, "master_weight_bits": 32, "eps_in_sqrt": True}
    ours, theirs = RMSprop([w], **options), TorchRMSprop([p], **options)
    g = normal(1, (300, 4))
    p.grad = torch.from_numpy(g).bfloat16()
    ours.step(grads=[p.grad])
    theirs.step()
    (full,) = ours.float32_params()
    for opt in (ours, theirs):
        opt.param_groups[0]["ema_decay"] = 0.5
    values = torch.from_numpy(normal(2, (2, 4))).bfloat16()
    ours.step(grads=[([7, 3], values)])
    p.grad = torch.sparse_coo_tensor([[7, 3]], values, p.shape, check_invariants=True)
    theirs.step()
    others = np.setdiff1d(np.arange(300), [3, 7])
    assert bits(ours.state[0]["ema"][others]) == bits(full[others])
    assert bits(ours.state[0]["ema"]) == bits(theirs.state[p]["ema"].numpy())
