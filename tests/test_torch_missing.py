"""A torch that lacks its private names, or its library's functions, takes longer and gives the same bits."""

import pytest

#: What is taken away before the first step.
MISSING = {
    "nothing": "",
    "where tensors are": "names.PROBES = ([], [], [])",
    "tensors that are alike": "names.PROBES = tuple(p + q for p, q in zip(names.PROBES, names.PROBES[1:] + names.PROBES[:1]))",
    "the library": "names.LIBRARY = 'no such library'",
    "the quick way to tell autograd": "names.increment_version = torch.autograd.graph.increment_version",
}

TRAIN = """
import hashlib, torch
from rmsprop import torch_names as names
from rmsprop.torch import RMSprop
{missing}

def train(**options):
    numbers = torch.Generator().manual_seed(0)
    normal = lambda *shape, **k: torch.randn(*shape, generator=numbers, **k)
    params = [normal(40, 30), normal(7), normal(3, 4, 5, 1, 2, 2), normal(6, dtype=torch.float64)]
    params += [normal(5, dtype=torch.complex64), normal(30, 40).t(), normal(300, 700)]
    params = [torch.nn.Parameter(p) for p in params]
    opt = RMSprop(params, lr=0.01, **options)
    for k in range(5):
        for p in params:
            p.grad = normal(p.shape, dtype=p.dtype)
        z = normal(8, dtype=torch.complex64)
        params[1].grad = z.conj().imag[:7]
        versions = [p._version for p in params]
        opt.step()
        assert all(p._version > version for p, version in zip(params, versions))
    return [*params, *(x for p in params for x in opt.state[p].values())]

found = hashlib.sha256()
for options in {{}}, {{"momentum": 0.9, "centered": True}}, {{"max_grad_norm": 0.5, "eps_in_sqrt": True}}:
    for tensor in train(**options):
        found.update(tensor.detach().resolve_conj().contiguous().numpy().tobytes())
print(found.hexdigest())
"""


@pytest.fixture(scope="module")
def found():
    """The hashes so far."""
    return set()


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
def test_the_same_bits(run_python, missing, found):
    found.add(run_python(TRAIN.format(missing=missing), timeout=300))
    assert len(found) == 1
