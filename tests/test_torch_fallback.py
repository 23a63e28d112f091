"""What the core does not take goes to torch's own rmsprop, tensor by tensor, with the same results, or is refused unharmed."""

import importlib
import sys

import pytest
import torch
from rmsprop.torch import RMSprop
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

Stock = torch.optim.RMSprop

OPTIONS = {
    "plain": {"alpha": 0.9},
    "momentum": {"alpha": 0.9, "momentum": 0.9, "weight_decay": 0.1},
    "all": {
        "alpha": 0.9,
        "momentum": 0.9,
        "weight_decay": 0.1,
        "centered": True,
        "maximize": True,
    },
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Tagged(torch.Tensor):
    """A subclass that torch functions keep: whatever they return is tagged."""


def random(seed, shape=(5, 6), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def of_dtype(dtype):
    return lambda seed: random(seed, dtype=dtype)


#: What makes a tensor of each kind; the seed tells a parameter from its gradients.
KINDS = {
    "complex64": of_dtype(torch.complex64),
    "complex128": of_dtype(torch.complex128),
    "complex, conjugate": lambda seed: of_dtype(torch.complex64)(seed).conj(),
    "complex, transposed": lambda seed: of_dtype(torch.complex64)(seed).t(),
    "meta": lambda seed: torch.empty(5, 6, device="meta"),
    "subclass": lambda seed: random(seed).as_subclass(Tagged),
    "two in one": lambda seed: TwoTensor(random(seed), random(seed + 100)),
    "negative view": lambda seed: random(seed, dtype=torch.complex64).conj().imag,
    "expanded": lambda seed: random(seed, (6,)).expand(5, 6),
    "sliding windows": lambda seed: random(seed).view(-1).as_strided((5, 6), (2, 1)),
    "mkldnn": lambda seed: random(seed).to_mkldnn(),
}


#: What the core takes after all.
OURS = ("complex64", "complex128", "complex, transposed")


def plain(tensor):
    """Ordinary dense tensors of the same values."""
    if isinstance(tensor, TwoTensor):
        return [plain(tensor.a), plain(tensor.b)]
    if tensor.is_meta:
        return torch.zeros(tensor.shape)
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.detach().as_subclass(torch.Tensor)
    return tensor.resolve_conj().resolve_neg().clone()


def everything(params, opt):
    """Parameters, state and what kind of tensor each is."""
    tensors = [*params, *(value for p in params for value in opt.state[p].values())]
    return [(type(tensor), tensor.dtype, plain(tensor)) for tensor in tensors]


def same(found, expected, bound=0):
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one[2], other[2], rtol=bound, atol=bound, equal_nan=True
        )


def outcome(function):
    """The exception of a call, by type and text."""
    try:
        function()
    except (
        AssertionError,
        AttributeError,
        FloatingPointError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        return type(error), str(error)
    return None


def mixed(kind, optimizer_class, **options):
    """An optimizer with an exotic parameter between two ordinary ones, and another group after them."""
    params = [
        nn.Parameter(random(0)),
        nn.Parameter(KINDS[kind](1)),
        nn.Parameter(random(2, dtype=torch.float64)),
        nn.Parameter(random(3)),
    ]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.1}]
    return params, optimizer_class(groups, **options)


def give(params, kind, seed):
    for index, param in enumerate(params):
        make = KINDS[kind] if index == 1 else of_dtype(param.dtype)
        param.grad = make(seed * 10 + index)


@EVERY_OPTION
@pytest.mark.parametrize("kind", KINDS)
def test_parameter(kind, options, contiguous):
    """Bit for bit what torch makes of it, its neighbours as ever; what torch refuses is refused."""
    check_parameter(kind, options, contiguous)


@pytest.mark.parametrize("kind", ["complex, conjugate", "meta", "subclass"])
def test_parameter_with_foreach(kind, contiguous):
    """Torch's own other implementation."""
    check_parameter(kind, {**OPTIONS["all"], "foreach": True}, contiguous)


def check_parameter(kind, options, contiguous):
    ours, opt = mixed(kind, RMSprop, **options, contiguous_params=contiguous)
    theirs, stock = mixed(kind, Stock, **options)
    for seed in (1, 2, 3):
        give(ours, kind, seed)
        give(theirs, kind, seed)
        expected = outcome(stock.step)
        assert outcome(opt.step) == expected
        if expected:
            return
    is_ours = kind in OURS
    if not is_ours:
        same(everything(ours[1:2], opt), everything(theirs[1:2], stock))
    for index in (0, 1, 2, 3) if is_ours else (0, 2, 3):
        found, wanted = (
            everything([ours[index]], opt),
            everything([theirs[index]], stock),
        )
        same(found, wanted, bound=16 * torch.finfo(ours[index].dtype).eps)


@pytest.fixture
def given_to_torch(monkeypatch):
    """The parameters that torch's own function is given from now on."""
    home = importlib.import_module("torch.optim.rmsprop")
    function, given = home.rmsprop, []

    def watched(params, *args, **kwargs):
        given.extend(params)
        return function(params, *args, **kwargs)

    for name, module in list(sys.modules.items()):
        if module is home or name.partition(".")[0] == "rmsprop":
            for key, value in list(vars(module).items()):
                if value is function:
                    monkeypatch.setattr(module, key, watched)
    return given


@EVERY_OPTION
def test_no_other_parameter_goes_to_torch(options, given_to_torch):
    """One among hundreds does not change a bit of theirs."""
    made = []
    for has_odd in (True, False):
        params = [nn.Parameter(random(seed, (7,))) for seed in range(500)]
        odd = nn.Parameter(KINDS["subclass"](1))
        opt = RMSprop([*params[:250], odd, *params[250:]], **options)
        for step in range(3):
            for seed, param in enumerate(params):
                param.grad = random(1000 * step + seed, (7,))
            odd.grad = KINDS["subclass"](step) if has_odd else None
            opt.step()
        made.append(everything(params, opt))
        if has_odd:
            assert [param is odd for param in given_to_torch] == [True] * 3
    assert len(given_to_torch) == 3
    same(*made)


GRADIENTS = {
    "negative view": KINDS["negative view"],
    "zero tensor": lambda seed: torch._efficientzerotensor((5, 6)),
    "expanded": lambda seed: random(seed, (6,)).expand(5, 6),
    "transposed": lambda seed: random(seed, (6, 5)).t(),
    "spread": lambda seed: random(seed, (10, 12))[::2, ::2],
    "copy on write": lambda seed: torch._lazy_clone(random(seed)),
    "subclass": KINDS["subclass"],
    "parameter": lambda seed: nn.Parameter(random(seed)),
    "with a graph": lambda seed: random(seed).requires_grad_() * 2,
    "vmapped": lambda seed: torch.vmap(torch.sin)(random(seed)),
    "functional": lambda seed: torch.func.grad(lambda x: (x**3).sum())(random(seed)),
    "inference": lambda seed: inferred(random(seed)),
}


def inferred(tensor):
    with torch.inference_mode():
        return tensor * 1


@EVERY_OPTION
@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradient(kind, options, contiguous):
    """Of an ordinary parameter: what torch reads out of it is what counts; it is not written to."""
    ours, theirs = ([nn.Parameter(random(seed)) for seed in (0, 1)] for _ in range(2))
    opt = RMSprop(ours, **options, contiguous_params=contiguous)
    stock = Stock(theirs, **options)
    for seed in (1, 2, 3):
        for params in (ours, theirs):
            params[0].grad, params[1].grad = GRADIENTS[kind](seed), random(-seed)
        expected = outcome(stock.step)
        before = plain(ours[0].grad)
        assert outcome(opt.step) == expected
        torch.testing.assert_close(plain(ours[0].grad), before, rtol=0, atol=0)
        if expected:
            return
    same(everything(ours, opt), everything(theirs, stock), bound=2e-6)


STATES = {
    "float64": lambda value: value.double(),
    "float16": lambda value: value.half(),
    "strided": lambda value: value.t().contiguous().t(),
    "spread": lambda value: value.repeat_interleave(2, 1)[:, ::2],
    "parameter": nn.Parameter,
    "subclass": lambda value: value.as_subclass(Tagged),
    "negative view": lambda value: torch.complex(value, -value).conj().imag,
    "expanded": lambda value: value[:1].expand(5, 6),
    "another shape": lambda value: value[0],
    "another number of elements": lambda value: value[:, :3],
    "meta": lambda value: value.to("meta"),
    "list": lambda value: value.tolist(),
}


@EVERY_OPTION
@pytest.mark.parametrize("kind", STATES)
def test_state_that_was_replaced(kind, options, contiguous):
    found = []
    for make, own in ((RMSprop, {"contiguous_params": contiguous}), (Stock, {})):
        param = nn.Parameter(random(0))
        param.grad = random(1)
        opt = make([param], **options, **own)
        opt.step()
        opt.state[param]["square_avg"] = STATES[kind](opt.state[param]["square_avg"])
        problem = outcome(opt.step)
        found.append((problem, None if problem else everything([param], opt)))
    assert found[0][0] == found[1][0]
    if not found[0][0]:
        same(found[0][1], found[1][1], bound=2e-6)


CHANGES = [
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.float32, torch.complex64),
]


@pytest.mark.parametrize("before, after", CHANGES)
def test_dtype_that_was_changed(before, after, contiguous):
    """Of the parameters, while their state keeps its own."""
    found = []
    for make, own in ((RMSprop, {"contiguous_params": contiguous}), (Stock, {})):
        param = nn.Parameter(random(0, dtype=before))
        opt = make([param], **OPTIONS["momentum"], **own)
        param.grad = random(1, dtype=before)
        opt.step()
        param.grad = None
        param.data = param.data.to(after)
        param.grad = random(2, dtype=after)
        problem = outcome(opt.step)
        found.append((problem, None if problem else everything([param], opt)))
    assert found[0][0] == found[1][0]
    if not found[0][0]:
        same(found[0][1], found[1][1], bound=2e-6)


def functional(optimizer_class):
    """Two steps as a function of tensors."""

    def steps(param, grad):
        param = param.clone()
        opt = optimizer_class([param], **OPTIONS["momentum"])
        for _ in range(2):
            param.grad = grad
            opt.step()
        return param

    return steps


TRANSFORMS = {
    "vmap": torch.vmap,
    "functionalize": torch.func.functionalize,
    "traced": lambda function: (
        lambda *args: make_fx(function)(*(torch.ones_like(arg) for arg in args))(*args)
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformed(transform):
    """The tensors that such a transform passes around look like any other and have no memory, or are not the ones it means."""
    found = [
        TRANSFORMS[transform](functional(optimizer_class))(random(0), random(1))
        for optimizer_class in (RMSprop, Stock)
    ]
    torch.testing.assert_close(*found, rtol=2e-6, atol=2e-6)


@EVERY_OPTION
def test_gradient_in_the_memory_of_its_parameter(options, contiguous):
    ours, theirs = nn.Parameter(random(0)), nn.Parameter(random(0))
    opt = RMSprop([ours], **options, contiguous_params=contiguous)
    stock = Stock([theirs], **options)
    for _ in range(3):
        ours.grad, theirs.grad = ours.detach(), theirs.detach()
        opt.step()
        stock.step()
    same(everything([ours], opt), everything([theirs], stock), bound=2e-6)


@EVERY_OPTION
def test_parameters_in_the_memory_of_each_other(options):
    """Are updated one after the other."""
    worlds = []
    for optimizer_class in (RMSprop, Stock):
        whole = random(0, (40,))
        params = [nn.Parameter(whole[start : start + 30]) for start in (0, 5, 10)]
        opt = optimizer_class(params, **options)
        for seed in (1, 2, 3):
            for index, param in enumerate(params):
                param.grad = random(seed * 10 + index, (30,))
            opt.step()
        worlds.append(everything(params, opt))
    same(*worlds, bound=1e-5)


def test_copy_on_write_parameter(contiguous):
    """The tensor that it still shares its memory with stays as it is."""
    source = random(0)
    param = nn.Parameter(torch._lazy_clone(source))
    opt = RMSprop([param], contiguous_params=contiguous)
    param.grad = random(1)
    opt.step()
    assert torch.equal(source, random(0))
    assert not torch.equal(param, source)


def test_fake_tensors():
    """Nothing is behind them, and nothing is touched."""
    with FakeTensorMode() as mode:
        model = nn.Linear(3, 4)
        opt = RMSprop(model.parameters(), momentum=0.9)
        model(torch.randn(2, 3)).sum().backward()
        opt.step()
    for param in model.parameters():
        for key in ("square_avg", "momentum_buffer"):
            assert opt.state[param][key].fake_mode is mode
            assert opt.state[param][key].shape == param.shape


@EVERY_OPTION
def test_lazy_module(options, contiguous):
    """Its parameters have no memory until the first forward."""
    worlds = []
    for make, own in ((RMSprop, {"contiguous_params": contiguous}), (Stock, {})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
        opt = make(model.parameters(), **options, **own)
        opt.step()
        for seed in (1, 2, 3):
            opt.zero_grad()
            model(random(seed)).square().sum().backward()
            opt.step()
        worlds.append(everything(list(model.parameters()), opt))
    same(*worlds, bound=1e-5)


def test_initial_square_avg(contiguous):
    """Is nothing but where the state starts: torch goes on from there."""
    tagged = KINDS["subclass"]
    ours, theirs = ([nn.Parameter(tagged(0))] for _ in range(2))
    opt = RMSprop(ours, initial_square_avg=1.0, contiguous_params=contiguous)
    stock = Stock(theirs)
    stock.state[theirs[0]] = {
        "step": torch.tensor(0.0),
        "square_avg": torch.ones(5, 6).as_subclass(Tagged),
    }
    for seed in (1, 2):
        ours[0].grad = theirs[0].grad = tagged(seed)
        opt.step()
        stock.step()
    same(everything(ours, opt), everything(theirs, stock))


# --- differentiable, capturable --------------------------------------------------------------


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["momentum"]])
def test_differentiable(options):
    """Gradients flow through steps, from the parameters back to gradients, state and what they were before."""
    found = []
    for optimizer_class in (RMSprop, Stock):
        start, grads, average = (
            random(seed, dtype=torch.float64).requires_grad_() for seed in (1, 2, 3)
        )
        param = start * 1
        opt = optimizer_class([nn.Parameter(random(0))], differentiable=True, **options)
        opt.param_groups[0]["params"] = [param]
        opt.state[param] = {
            "step": torch.tensor(0.0),
            "square_avg": average.square() + 1,
            "momentum_buffer": torch.zeros_like(start),
        }
        for power in (1, 2):
            param.grad = grads**power
            opt.step()
        param.square().sum().backward()
        found.append([start.grad, grads.grad, average.grad])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("option", ["differentiable", "capturable"])
def test_as_stock_refuses(option):
    """A leaf as `differentiable` parameter; a tensor on the CPU as `capturable` one."""
    found = []
    for optimizer_class in (RMSprop, Stock):
        param = nn.Parameter(random(0))
        param.grad = random(1)
        found.append(outcome(optimizer_class([param], **{option: True}).step))
        assert torch.equal(param, random(0))
    assert found[0] == found[1]
    assert found[0][0] in (RuntimeError, AssertionError)


# --- what is refused, and then nothing has changed -------------------------------------------


def sparse(shape=(5, 6)):
    return torch.sparse_coo_tensor(
        [[0, 1], [0, 1]], [1.0, 2.0], shape, check_invariants=True
    )


def snapshot(params, opt):
    """Every bit and every version."""
    state = {
        index: {key: plain(value) for key, value in opt.state.get(param, {}).items()}
        for index, param in enumerate(params)
    }
    return [plain(param) for param in params], [p._version for p in params], state


def refuses(opt, params, error, match):
    before = snapshot(params, opt)
    with pytest.raises(error, match=match):
        opt.step()
    found = snapshot(params, opt)
    torch.testing.assert_close(found, before, rtol=0, atol=0)


STEPPED = pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])


@STEPPED
def test_sparse_gradient(stepped, contiguous):
    params = [nn.Parameter(random(seed)) for seed in range(3)]
    opt = RMSprop(params, momentum=0.9, contiguous_params=contiguous)
    for param in params:
        param.grad = random(7)
    if stepped:
        opt.step()
    params[1].grad = sparse()
    refuses(opt, params, ValueError, "^gradient 1: expected a gradient of rows, got")
    opt.param_groups[0]["capturable"] = True
    refuses(opt, params, RuntimeError, "^RMSprop does not support sparse gradients$")


MOMENTUM = {"momentum": 0.9}
OWN = {
    "eps_in_sqrt": {"eps_in_sqrt": True},
    "lr_in_momentum": {"lr_in_momentum": True, **MOMENTUM},
    "nesterov": {"nesterov": True, **MOMENTUM},
    "bias_correction": {"bias_correction": True},
    "decoupled_weight_decay": {"decoupled_weight_decay": True, "weight_decay": 0.1},
    "clip_weights": {"clip_weights": 1.0},
    "ema_decay": {"ema_decay": 0.5},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "nonfinite": {"nonfinite": "skip"},
    "state_dtype": {"state_dtype": "float32"},
    "rounding": {"rounding": "stochastic"},
    "master_weight_bits": {"master_weight_bits": 32},
}
TO_TORCH = ["meta", "subclass", "two in one"]


@STEPPED
@pytest.mark.parametrize("kind", TO_TORCH)
@pytest.mark.parametrize("option", OWN)
def test_option_that_torch_does_not_have(option, kind, stepped, contiguous):
    """The message names the option and the parameter: by its index over all groups, and its name."""
    odd = nn.Parameter(KINDS[kind](3))
    params = [random(0), odd, random(1)]
    params = [nn.Parameter(p) if type(p) is torch.Tensor else p for p in params]
    groups = [
        {"params": [("first", params[0])]},
        {"params": [("odd", params[1]), ("last", params[2])]},
    ]
    opt = RMSprop(groups, **OWN[option], contiguous_params=contiguous)
    params[0].grad = random(4)
    params[2].grad = random(5)
    if stepped:
        opt.step()  # the odd one has no gradient, so it is in nobody's way
    params[1].grad = KINDS[kind](6)
    refuses(opt, params, ValueError, rf"(?s)(?=.*\b{option}\b)(?=.*\b1\b)(?=.*'odd')")
    assert opt.skipped_steps == 0


def infinite(params, opt):
    opt.nonfinite = "raise"
    params[2].grad = torch.full_like(params[2], torch.inf)


def skipped(params, opt):
    opt.nonfinite = "skip"
    params[2].grad = torch.full_like(params[2], torch.inf)


def row_sparse(params, opt):
    params[2].grad = sparse()


def not_of_torch(params, opt):
    opt.param_groups[0]["nesterov"] = True
    state = opt.state[params[2]]
    state["square_avg"] = state["square_avg"].half()


@pytest.mark.parametrize("spoil", [infinite, skipped, row_sparse, not_of_torch])
def test_state_of_an_option_that_was_just_switched_on(spoil, contiguous):
    """A step that fails or is left out has not made it."""
    params = [nn.Parameter(random(seed)) for seed in range(3)]
    opt = RMSprop(params, contiguous_params=contiguous)
    for param in params:
        param.grad = random(7)
    opt.step()
    before = everything(params[:2], opt)
    opt.param_groups[0].update(momentum=0.9, centered=True)
    spoil(params, opt)
    for _ in range(2):
        assert outcome(opt.step) or spoil is skipped
        same(everything(params[:2], opt), before)
        assert {len(opt.state[param]) for param in params} == {2}


@pytest.mark.parametrize("option", OWN)
def test_option_that_torch_does_not_have_and_differentiable(option):
    params = [nn.Parameter(random(0)), nn.Parameter(random(1))]
    groups = [{"params": params[:1]}, {"params": params[1:], "differentiable": True}]
    opt = RMSprop(groups, **OWN[option])
    for param in params:
        param.grad = random(2)
    refuses(opt, params, ValueError, rf"(?s)(?=.*\b{option}\b)(?=.*\b1\b)")


@pytest.mark.parametrize(
    "option", ["lr_in_momentum", "nesterov", "decoupled_weight_decay"]
)
@pytest.mark.parametrize("kind", ["meta", "subclass"])
def test_option_without_effect(kind, option):
    """Without momentum, or without decay, there is nothing to refuse."""
    ours, opt = mixed(kind, RMSprop, **{option: True})
    theirs, stock = mixed(kind, Stock)
    for params, each in ((ours, opt), (theirs, stock)):
        give(params, kind, 1)
        each.step()
    same(everything(ours[1:2], opt), everything(theirs[1:2], stock))
