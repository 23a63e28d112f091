"""Promise: a complex parameter is a pair of reals: a step makes of it bit for bit what it makes of `torch.view_as_real`."""

import pytest
import torch
from rmsprop.torch import RMSprop
from torch_pairs import CLASSES, FORMS, OWN, bits, normal, outcome

DTYPES = pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
SHAPES = ((7, 5), (11,), (), (2, 3, 4), (5000,))
OPTIONS = {
    **FORMS,
    **{key: {**FORMS["all"], key: value} for key, value in OWN.items()},
    "start, plain": {"initial_square_avg": 1.0, "eps_in_sqrt": True},
    "own": {**FORMS["all"], **OWN},
    "norm": {"max_grad_norm": 0.5, "momentum": 0.9},
    "skip": {"nonfinite": "skip"},
    "contiguous": {"contiguous_params": True},
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def complex_normal(seed, shape, dtype):
    parts = [normal((seed, k), shape, dtype.to_real()) for k in (0, 1)]
    return torch.complex(*parts)


def real(tensor):
    """The pair of reals of each number, apart from it."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(tensor).clone() if tensor.is_complex() else tensor.clone()


class Twins:
    """Complex parameters between real ones, and the same as reals."""

    def __init__(self, dtype, shapes=SHAPES, **options):
        self.params = [
            complex_normal(k, shape, dtype).requires_grad_()
            for k, shape in enumerate(shapes)
        ]
        self.params.insert(1, normal(98, (6,), dtype.to_real()).requires_grad_())
        self.reals = [real(param).requires_grad_() for param in self.params]
        self.opt = RMSprop(self.params, **options)
        self.expected = RMSprop(self.reals, **options)

    def step(self, grads):
        for param, same, grad in zip(self.params, self.reals, grads, strict=True):
            param.grad = grad
            same.grad = None if grad is None else real(grad)
        self.opt.step()
        self.expected.step()

    def grads(self, seed):
        return [
            complex_normal((seed, k), param.shape, param.dtype)
            if param.is_complex()
            else normal((seed, k), param.shape, param.dtype)
            for k, param in enumerate(self.params)
        ]

    def check(self):
        assert [param.is_complex() for param in self.params].count(False) == 1
        assert bits([real(param) for param in self.params]) == bits(self.reals)
        for param, same in zip(self.params, self.reals, strict=True):
            mine, its = self.opt.state[param], self.expected.state[same]
            assert list(mine) == list(its)
            for key in mine:
                if key != "step":
                    assert mine[key].dtype == param.dtype
                    assert mine[key].shape == param.shape
                assert bits(real(mine[key])) == bits(its[key])
        assert self.opt.last_grad_norm == self.expected.last_grad_norm
        assert self.opt.skipped_steps == self.expected.skipped_steps


@EVERY_OPTION
@DTYPES
def test_as_pairs_of_reals(dtype, options):
    """Parameters, state, and the norm of the gradients."""
    twins = Twins(dtype, **options)
    for seed in range(4):
        twins.step(twins.grads(seed))
        twins.check()


@DTYPES
def test_both_parts_of_state_start_at_its_start_value(dtype):
    twins = Twins(dtype, initial_square_avg=1.0, alpha=1.0)
    twins.step(twins.grads(0))
    for param in twins.params:
        assert (real(twins.opt.state[param]["square_avg"]) == 1).all()
    twins.check()


# Of 5 x 7 numbers; what a gradient's memory holds need not be what it stands for.
GRADIENTS = {
    "conjugate": lambda z: z.conj(),
    "conjugate, transposed": lambda z: z.t().contiguous().conj().t(),
    "physical conjugate": lambda z: z.conj_physical(),
    "transposed": lambda z: z.t().contiguous().t(),
    "spread": lambda z: z.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda z: z[0].expand(5, 7),
    "one number": lambda z: z[0, 0].expand(5, 7),
    "conjugate of expanded": lambda z: z[0].expand(5, 7).conj(),
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("options", [{}, OPTIONS["own"], OPTIONS["norm"]], ids=str)
@DTYPES
def test_gradients(dtype, options, kind):
    twins = Twins(dtype, [(5, 7)] * 2, **options)
    for seed in range(4):
        grads = twins.grads(seed)
        grads[0] = GRADIENTS[kind](grads[0])
        before = real(grads[0])
        twins.step(grads)
        assert torch.equal(real(grads[0]), before)
        twins.check()


PARAMETERS = {
    "transposed": lambda z: z.t().contiguous().t(),
    "spread": lambda z: z.repeat_interleave(2, 1)[:, ::2],
    "part of another": lambda z: torch.cat([z, z])[1:6],
    "none": lambda z: z[:0],
}


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("options", [{}, OPTIONS["own"]], ids=["plain", "own"])
@DTYPES
def test_layouts_of_parameters(dtype, options, kind):
    twins = Twins(dtype, [(5, 7)], **options)
    for param, same in zip(twins.params, twins.reals, strict=True):
        if param.is_complex():
            param.data = PARAMETERS[kind](param.detach())
            same.data = real(param)
    for seed in range(3):
        twins.step(twins.grads(seed))
        twins.check()


@DTYPES
def test_a_parameter_with_a_pending_conjugate(dtype):
    """Refused in torch's own words, or stepped as what it stands for."""
    outcomes = []
    for cls in CLASSES:
        param = complex_normal(0, (5, 7), dtype).conj().detach().requires_grad_()
        same = param.detach().resolve_conj().clone().requires_grad_()
        assert param.is_conj()
        opts = [cls([one], momentum=0.9) for one in (param, same)]
        for one in (param, same):
            one.grad = complex_normal(1, (5, 7), dtype)
        before = bits(real(param))
        outcomes.append(outcome(opts[0].step))
        if outcomes[-1]:
            assert bits(real(param)) == before
        else:
            opts[1].step()
            torch.testing.assert_close(param, same, rtol=1e-5, atol=1e-6)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("part", [complex(1, float("nan")), complex(float("inf"), 0)])
@DTYPES
def test_either_part_can_be_infinite_or_nan(dtype, part):
    for nonfinite in ("propagate", "skip"):
        twins = Twins(dtype, nonfinite=nonfinite)
        twins.step(twins.grads(0))
        grads = twins.grads(1)
        grads[-1].view(-1)[7] = part
        twins.step(grads)
        twins.check()
        assert twins.opt.skipped_steps == (nonfinite == "skip")
    twins = Twins(dtype, nonfinite="raise")
    before = bits(twins.params)
    grads = twins.grads(1)
    grads[-1].view(-1)[7] = part
    with pytest.raises(FloatingPointError, match="gradient 5"):
        twins.step(grads)
    assert bits(twins.params) == before
    assert not any(twins.opt.state.values())


@DTYPES
def test_checkpoints_of_torch(dtype):
    """Its complex state goes on here, and ours there."""
    params = [complex_normal(0, (7, 5), dtype).requires_grad_() for _ in range(2)]
    opts = [
        cls([param], momentum=0.9)
        for cls, param in zip((torch.optim.RMSprop, RMSprop), params, strict=True)
    ]
    for seed in range(4):
        for param, opt in zip(params, opts, strict=True):
            param.grad = complex_normal(seed + 1, (7, 5), dtype)
            opt.step()
        first, second = (opt.state_dict() for opt in opts)
        opts[0].load_state_dict(second)
        opts[1].load_state_dict(first)
    torch.testing.assert_close(*params, rtol=1e-5, atol=1e-6)


@DTYPES
def test_versions_rise(dtype):
    """Of what was written, so that a backward through it is refused."""
    twins = Twins(dtype, momentum=0.9, centered=True)
    for seed in range(3):
        tensors = [
            tensor
            for param in twins.params
            for tensor in (param, *twins.opt.state[param].values())
        ]
        before = [tensor._version for tensor in tensors]
        twins.step(twins.grads(seed))
        for tensor, version in zip(tensors, before, strict=True):
            assert tensor._version > version or tensor.shape == ()
