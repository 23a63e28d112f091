"""Beyond one process, on torch's own engines: DDP, ZeRO, FSDP2 and distributed checkpoints work as with the stock class."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import Ranks, on_both_ranks
from rmsprop.torch import RMSprop
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_map_only

Stock = torch.optim.RMSprop

OPTIONS = {
    "plain": {},
    "centered": {"centered": True, "alpha": 0.9},
    "all": {
        "momentum": 0.9,
        "centered": True,
        "weight_decay": 0.1,
        "maximize": True,
        "alpha": 0.9,
    },
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
MOMENTUM = {"momentum": 0.9, "weight_decay": 0.1, "alpha": 0.9}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


# --- what the tests train --------------------------------------------------------------------


def whole_model(dtype=torch.float64):
    """Row counts that are even, odd, and less than the ranks."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, 4)
    return nn.Sequential(*layers).to(dtype)


def even_model():
    torch.manual_seed(0)
    layers = nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh()
    return nn.Sequential(*layers).double()


def mesh(*shape):
    names = ("one", "other")[: len(shape)]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def sharded_model(dtype=torch.float64):
    """Two communication groups; one rank's part of the middle layer is empty."""
    model = whole_model(dtype)
    fully_shard(model[0], mesh=mesh(2))
    return fully_shard(model, mesh=mesh(2))


def hybrid_model():
    """The first layer is sharded, of the others each rank has a replica: on two meshes."""
    model = whole_model()
    fully_shard(model[0], mesh=mesh(2))
    return fully_shard(model, mesh=mesh(2, 1))


def partly_sharded_model():
    """The first layer is sharded, of the others each rank has plain tensors."""
    model = whole_model()
    fully_shard(model[0], mesh=mesh(2))
    return model


def sharded_by_columns_model():
    return fully_shard(
        even_model(),
        mesh=mesh(2),
        shard_placement_fn=lambda param: Shard(param.ndim - 1),
    )


def tensor_parallel_model():
    """Sharded in two ways at once, and one bias is replicated; both ranks take the whole batch."""
    both = mesh(1, 2)
    styles = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(even_model(), both["other"], styles)
    model.takes_all = True
    return fully_shard(model, mesh=both["one"])


MODELS = [
    sharded_model,
    hybrid_model,
    partly_sharded_model,
    sharded_by_columns_model,
    tensor_parallel_model,
]
EVERY_MODEL = pytest.mark.parametrize("build", MODELS)


def backward(model, seed):
    """Gradients of a batch, of which each rank has a half; where no engine averages them, this does."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    batch = torch.randn(8, 6, generator=generator, dtype=dtype)
    if not getattr(model, "takes_all", False):
        batch = batch.chunk(2)[dist.get_rank()]
    for param in model.parameters():
        param.grad = None
    model(batch).square().mean().backward()
    if not isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
        for param in model.parameters():
            if not isinstance(param, DTensor):
                dist.all_reduce(param.grad, dist.ReduceOp.AVG)


def train(model, opt, seeds):
    for seed in seeds:
        backward(model, seed)
        opt.step()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def values(model):
    return [full(param.detach()).clone() for param in model.parameters()]


def local_values(model, opt):
    """Every bit that this rank holds, and the step counts."""
    tensors = []
    for param in model.parameters():
        for tensor in (param.detach(), *opt.state.get(param, {}).values()):
            tensors.append(getattr(tensor, "_local_tensor", tensor).clone())
    return tensors


def close(found, expected, ulps=64):
    """Some ulp apart at most, in units of 1: the numbers here are about that large."""
    for one, other in zip(found, expected, strict=True):
        bound = ulps * torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=bound, atol=bound, equal_nan=True)


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def same_on_both_ranks(tensors):
    for tensor in tensors:
        gathered = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(gathered, tensor)
        same(gathered[:1], gathered[1:])


def one_process(model):
    """Its parameters as two lists of plain ones."""
    return [[nn.Parameter(value) for value in values(model)] for _ in range(2)]


def gradients(model):
    return [full(param.grad).clone() for param in model.parameters()]


def copied(state_dict):
    return tree_map_only(torch.Tensor, torch.clone, state_dict)


def on_ranks(value):
    """The value of each rank."""
    gathered = [None, None]
    dist.all_gather_object(gathered, value)
    return gathered


# --- DistributedDataParallel -----------------------------------------------------------------


@EVERY_OPTION
@pytest.mark.parametrize("view", [False, True], ids=["copied", "bucket view"])
@on_both_ranks
def test_data_parallel(view, options, contiguous):
    found = []
    for make, own in ((RMSprop, {"contiguous_params": contiguous}), (Stock, {})):
        model = DistributedDataParallel(whole_model(), gradient_as_bucket_view=view)
        train(model, make(model.parameters(), **options, **own), range(4))
        same_on_both_ranks(values(model))
        found.append(values(model))
    close(*found, ulps=1000)


@pytest.mark.parametrize("view", [False, True], ids=["copied", "bucket view"])
@on_both_ranks
def test_data_parallel_clips(view, contiguous):
    ours, theirs = (
        DistributedDataParallel(whole_model(), gradient_as_bucket_view=view)
        for _ in range(2)
    )
    options = {"max_grad_norm": 0.1, "contiguous_params": contiguous}
    opt = RMSprop(ours.parameters(), **MOMENTUM, **options)
    stock = Stock(theirs.parameters(), **MOMENTUM)
    for seed in range(4):
        train(ours, opt, [seed])
        backward(theirs, seed)
        norm = clip_grad_norm_(theirs.parameters(), 0.1).item()
        stock.step()
        assert norm > 0.1
        assert opt.last_grad_norm == pytest.approx(norm, rel=1e-12, abs=0)
    close(values(ours), values(theirs), ulps=1000)
    assert len(set(on_ranks(opt.last_grad_norm))) == 1


# --- ZeroRedundancyOptimizer -----------------------------------------------------------------


@EVERY_OPTION
@pytest.mark.parametrize("view", [False, True], ids=["broadcast", "bucket view"])
@on_both_ranks
def test_zero_redundancy(view, options, contiguous):
    """As on one process; a scheduler changes lr; the consolidated state loads in both unsharded classes."""
    ours, theirs = whole_model(), whole_model()
    opt = ZeroRedundancyOptimizer(
        ours.parameters(),
        optimizer_class=RMSprop,
        parameters_as_bucket_view=view,
        contiguous_params=contiguous,
        **options,
    )
    stock = Stock(theirs.parameters(), **options)
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (opt, stock)
    ]
    for seed in range(4):
        train(ours, opt, [seed])
        train(theirs, stock, [seed])
        for schedule in schedules:
            schedule.step()
    assert opt.optim.param_groups[0]["lr"] == stock.param_groups[0]["lr"] * 2
    close(values(ours), values(theirs), ulps=1000)
    same_on_both_ranks(values(ours))

    opt.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        checkpoint = opt.state_dict()
        for optimizer_class in (Stock, RMSprop):
            model = whole_model()
            model.load_state_dict(ours.state_dict())
            alone = optimizer_class(model.parameters())
            alone.load_state_dict(checkpoint)
            for state, expected in zip(
                alone.state.values(), stock.state.values(), strict=True
            ):
                assert state.keys() == expected.keys()
                assert state["step"] == 4
                for key in state:
                    close([state[key]], [expected[key]], ulps=1000)


@on_both_ranks
def test_zero_redundancy_with_fewer_parameters_than_ranks():
    param = nn.Parameter(torch.ones(3))
    opt = ZeroRedundancyOptimizer([param], optimizer_class=RMSprop, alpha=0.75)
    for _ in range(3):
        param.grad = torch.ones(3)
        opt.step()
    other = torch.ones(3, requires_grad=True)
    other.grad = torch.ones(3)
    stock = Stock([other], alpha=0.75)
    for _ in range(3):
        stock.step()
    close([param.detach()], [other.detach()], ulps=4)


@pytest.mark.parametrize("own", [{"max_grad_norm": 1.0}, {"nonfinite": "skip"}])
@on_both_ranks
def test_zero_redundancy_refuses_what_needs_all_gradients(own):
    """Each rank's optimizer sees the gradients of its own parameters only."""
    with pytest.raises(ValueError, match=next(iter(own))):
        ZeroRedundancyOptimizer(
            whole_model().parameters(), optimizer_class=RMSprop, **own
        )


# --- FSDP, the first and the second ----------------------------------------------------------


@EVERY_OPTION
@pytest.mark.parametrize("original", [False, True], ids=["flat", "original"])
@on_both_ranks
def test_fully_sharded_data_parallel(original, options, contiguous):
    found = []
    for make, own in ((RMSprop, {"contiguous_params": contiguous}), (Stock, {})):
        model = FullyShardedDataParallel(
            whole_model(), use_orig_params=original, device_id=torch.device("cpu")
        )
        opt = make(model.parameters(), **options, **own)
        for seed in range(4):
            opt.zero_grad()
            backward(model, seed)
            opt.step()
        with FullyShardedDataParallel.summon_full_params(model):
            found.append(values(model))
    close(*found, ulps=1000)


@EVERY_MODEL
@EVERY_OPTION
@on_both_ranks
def test_fully_shard(build, options, contiguous):
    """As stock sharded alike; the state is made of what stock's is."""
    ours, theirs = build(), build()
    opt = RMSprop(ours.parameters(), **options, contiguous_params=contiguous)
    stock = Stock(theirs.parameters(), **options)
    train(ours, opt, range(4))
    train(theirs, stock, range(4))
    close(values(ours), values(theirs), ulps=1000)
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        state, expected = opt.state[param], stock.state[other]
        assert list(state) == list(expected)
        assert type(param) is type(other)
        assert param._version == other._version
        for key, value in state.items():
            assert type(value) is type(expected[key])
            if isinstance(value, DTensor):
                assert value.placements == expected[key].placements
                assert value.device_mesh == expected[key].device_mesh
                assert type(value._local_tensor) is torch.Tensor
            close([full(value)], [full(expected[key])], ulps=1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@EVERY_OPTION
@on_both_ranks
def test_fully_shard_equals_one_process(dtype, options):
    """The optimizer's part of it bit for bit: it gets the sharded model's gradients."""
    sharded, whole = sharded_model(dtype), whole_model(dtype)
    opt = RMSprop(sharded.parameters(), **options)
    alone = RMSprop(whole.parameters(), **options)
    for seed in range(4):
        train(sharded, opt, [seed])
        for param, source in zip(whole.parameters(), sharded.parameters(), strict=True):
            param.grad = source.grad.full_tensor()
        alone.step()
    same(values(sharded), values(whole))

    everything = whole_model(dtype)
    train(everything, Stock(everything.parameters(), **options), range(4))
    close(values(sharded), values(everything), ulps=4000)


@pytest.mark.parametrize("build", [sharded_model, hybrid_model, tensor_parallel_model])
@EVERY_OPTION
@on_both_ranks
def test_fully_shard_steps_in_backward(build, options):
    """Each parameter when its gradient is averaged: the bits of a step after the backward."""
    inside, after = build(), build()
    opt = RMSprop(inside.parameters(), **options)
    other = RMSprop(after.parameters(), **options)
    opt.step_in_backward()
    for seed in range(4):
        backward(inside, seed)
        assert all(param.grad is None for param in inside.parameters())
        opt.step()  # has nothing left to do
        train(after, other, [seed])
    same(local_values(inside, opt), local_values(after, other))


@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
@EVERY_MODEL
@on_both_ranks
def test_fully_shard_clips(build, bad):
    """By the norm over all parts, each counted once: the same on all ranks, and as on one process."""
    model = build()
    opt = RMSprop(model.parameters(), **MOMENTUM, max_grad_norm=0.1)
    whole = one_process(model)
    alone = RMSprop(whole[0], **MOMENTUM, max_grad_norm=0.1)
    stock = Stock(whole[1], **MOMENTUM)
    for seed in range(4):
        backward(model, seed)
        if bad and seed == 3 and dist.get_rank() == 1:
            model[0].weight.grad._local_tensor[-1:, -1:] = bad
        before = gradients(model)
        opt.step()
        same(gradients(model), before)
        for params in whole:
            for param, grad in zip(params, before, strict=True):
                param.grad = grad.clone()
        alone.step()
        norm = clip_grad_norm_(whole[1], 0.1).item()
        stock.step()
        for expected, tolerance in ((norm, 1e-12), (alone.last_grad_norm, 1e-14)):
            assert opt.last_grad_norm == pytest.approx(
                expected, rel=tolerance, abs=0, nan_ok=True
            )
        assert not norm <= 0.1
        assert len(set(map(repr, on_ranks(opt.last_grad_norm)))) == 1
    for params in whole:
        close(values(model), [param.detach() for param in params], ulps=1000)


@pytest.mark.parametrize("layers", [[], [0], [2], [0, 4]])
@on_both_ranks
def test_fully_shard_clips_what_has_gradients(layers):
    """On all ranks or on none: an engine makes them together."""
    model = sharded_model()
    opt = RMSprop(model.parameters(), max_grad_norm=0.1, nonfinite="raise")
    params = [param for layer in layers for param in model[layer].parameters()]
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    numel = sum(param.numel() for param in params)
    assert opt.last_grad_norm == pytest.approx(math.sqrt(numel))
    assert list(opt.state) == params


BAD = [("0.bias", 0), ("0.bias", 1), ("2.weight", 0)]


@pytest.mark.parametrize("name, rank", BAD)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("build", [sharded_model, partly_sharded_model])
@on_both_ranks
def test_a_bad_element_on_one_rank_stops_all(
    build, nonfinite, max_grad_norm, name, rank
):
    """Nothing changes anywhere, and all take the next step."""
    model = build()
    opt = RMSprop(
        model.parameters(),
        **MOMENTUM,
        nonfinite=nonfinite,
        max_grad_norm=max_grad_norm,
    )
    train(model, opt, [0])
    before = local_values(model, opt)
    backward(model, 1)
    grad = model.get_parameter(name).grad
    if not isinstance(grad, DTensor):
        grad[...] = math.inf
    elif dist.get_rank() == rank:
        grad._local_tensor[-1:] = math.inf
    if nonfinite == "skip":
        opt.step()
        assert opt.skipped_steps == 1
        assert opt.last_grad_norm == (max_grad_norm and math.inf)
    else:
        with pytest.raises(FloatingPointError):
            opt.step()
    same(local_values(model, opt), before)
    train(model, opt, [2])
    assert {state["step"].item() for state in opt.state.values()} == {2}
    assert all(value.isfinite().all() for value in values(model))


@on_both_ranks
def test_one_rank_steps_alone():
    """Without an option that looks at all gradients, or without shards, nobody is waited for."""
    model, plain = sharded_model(), whole_model()
    opts = [
        RMSprop(model.parameters(), **MOMENTUM),
        RMSprop(plain.parameters(), max_grad_norm=1.0, nonfinite="skip"),
    ]
    for each in (model, plain):
        backward(each, 0)
    for opt in opts:
        for _ in range(1 + dist.get_rank()):
            opt.step()
        counts = {state["step"].item() for state in opt.state.values()}
        assert counts == {1 + dist.get_rank()}


@pytest.mark.parametrize("build", [sharded_model, tensor_parallel_model])
@on_both_ranks
def test_grad_scaler(build):
    """An infinite gradient on one rank: all of them leave the step out, and the scale is halved."""
    found = []
    for optimizer_class in (RMSprop, Stock):
        model = build()
        opt = optimizer_class(model.parameters(), **MOMENTUM)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        scales = []
        for seed in range(4):
            backward(model, seed)
            for param in model.parameters():
                param.grad *= scaler.scale(torch.ones(()))
            if seed == 1 and dist.get_rank() == 1:
                model[0].bias.grad._local_tensor[-1] = math.inf
            scaler.step(opt)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales == [8, 4, 4, 8]
        found.append(values(model))
    close(*found, ulps=1000)


GIVEN = {
    "replicated": lambda grad: grad.redistribute(placements=[Replicate()]),
    "partial": lambda grad: DTensor.from_local(
        full(grad) * (0.75 if dist.get_rank() else 0.25), grad.device_mesh, [Partial()]
    ),
    "transposed": lambda grad: DTensor.from_local(
        grad._local_tensor.t().contiguous().t(), grad.device_mesh, grad.placements
    ),
    "sharded by columns": lambda grad: grad.redistribute(
        placements=[Shard(grad.ndim - 1)]
    ),
}


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("layout", GIVEN)
@on_both_ranks
def test_a_gradient_laid_out_otherwise(layout, max_grad_norm):
    """Is brought to where its parameter is."""
    ours, theirs = (fully_shard(even_model(), mesh=mesh(2)) for _ in range(2))
    opt = RMSprop(ours.parameters(), **MOMENTUM, max_grad_norm=max_grad_norm)
    stock = Stock(theirs.parameters(), **MOMENTUM)
    for seed in range(3):
        backward(ours, seed)
        backward(theirs, seed)
        if max_grad_norm:
            clip_grad_norm_(theirs.parameters(), max_grad_norm)
        for model in (ours, theirs):
            for param in model.parameters():
                param.grad = GIVEN[layout](param.grad)
        opt.step()
        stock.step()
    close(values(ours), values(theirs), ulps=1000)


@EVERY_MODEL
@on_both_ranks
def test_state_dict_of_shards(build):
    """Goes on where the saved one was, in ours and in stock."""
    model = build()
    opt = RMSprop(model.parameters(), **MOMENTUM)
    train(model, opt, range(2))
    saved = copied(model.state_dict()), copied(opt.state_dict())
    train(model, opt, range(2, 4))
    for optimizer_class in (RMSprop, Stock):
        fresh = build()
        other = optimizer_class(fresh.parameters(), **MOMENTUM)
        fresh.load_state_dict(saved[0])
        other.load_state_dict(copied(saved[1]))
        train(fresh, other, range(2, 4))
        close(values(fresh), values(model), ulps=1000)


# --- distributed checkpoints -----------------------------------------------------------------


@pytest.mark.parametrize("own", [{}, {"max_grad_norm": 1.0, "nonfinite": "raise"}])
@EVERY_MODEL
@on_both_ranks
def test_checkpoint_makes_the_state_of_a_fresh_optimizer(build, own):
    """By a step with zero gradients and lr 0, which changes no bit of a parameter."""
    model = build()
    with torch.no_grad():
        for param in model.parameters():
            getattr(param, "_local_tensor", param).view(-1)[:1] = -0.0
    opt = RMSprop(model.parameters(), lr=0.5, **OPTIONS["all"], **own)
    before = values(model)
    found = get_optimizer_state_dict(model, opt)
    assert set(found["state"]) == {name for name, _ in model.named_parameters()}
    same(values(model), before)
    assert [value.signbit().tolist() for value in values(model)] == [
        value.signbit().tolist() for value in before
    ]
    assert opt.param_groups[0]["lr"] == 0.5
    assert all(param.grad is None for param in model.parameters())


KINDS = {"sharded": sharded_model, "whole": whole_model}
CLASSES = {"ours": RMSprop, "stock": Stock}
FORMS = {"nested": {}, "flat": {"flatten_optimizer_state_dict": True}}


def trained(kind, optimizer_class):
    model = KINDS[kind]()
    opt = optimizer_class(model.parameters(), **MOMENTUM)
    train(model, opt, range(2))
    return model, opt


def untrained(kind, optimizer_class):
    """Whatever it has of its own is to be replaced."""
    model = KINDS[kind]()
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    return model, optimizer_class(model.parameters(), lr=0.5, momentum=0.5)


def named(states):
    return dict(zip(("model_state_dict", "optim_state_dict"), states, strict=True))


def goes_on_as(found, expected):
    for model, opt in (found, expected):
        train(model, opt, range(2, 4))
    close(values(found[0]), values(expected[0]), ulps=1000)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("loads", CLASSES)
@pytest.mark.parametrize("saves", CLASSES)
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
@on_both_ranks
def test_checkpoint(source, target, saves, loads, form, tmp_path):
    """Saved on two ranks or one, loaded on two ranks or one, by ours or stock: training goes on as before."""
    options = StateDictOptions(**form)
    model, opt = trained(source, CLASSES[saves])
    saved = get_state_dict(model, opt, options=options)
    if source == "sharded" or dist.get_rank() == 0:
        no_dist = source == "whole"
        dcp.save(named(saved), checkpoint_id=tmp_path, no_dist=no_dist)
    dist.barrier()

    fresh, other = untrained(target, CLASSES[loads])
    loaded = named(get_state_dict(fresh, other, options=options))
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=target == "whole")
    set_state_dict(fresh, other, **loaded, options=options)
    goes_on_as((fresh, other), (model, opt))


@pytest.mark.parametrize(
    "target, broadcast", [("sharded", False), ("sharded", True), ("whole", False)]
)
@on_both_ranks
def test_full_checkpoint(target, broadcast):
    """Plain tensors, on each rank or on the first one alone, which sends them to the others."""
    model, opt = trained("sharded", RMSprop)
    options = StateDictOptions(full_state_dict=True, cpu_offload=broadcast)
    saved = named(get_state_dict(model, opt, options=options))
    if dist.get_rank() == 0:
        state = saved["optim_state_dict"]["state"]["0.weight"]
        assert state["square_avg"].shape == (7, 6)
        assert type(state["square_avg"]) is torch.Tensor
    fresh, other = untrained(target, RMSprop)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    # `set_state_dict` takes the empty one of the second rank for a wish to load none.
    set_model_state_dict(fresh, saved["model_state_dict"], options=options)
    set_optimizer_state_dict(fresh, other, saved["optim_state_dict"], options=options)
    goes_on_as((fresh, other), (model, opt))
