"""The array class says that torch's modules have a class of their own, which is at hand as `rmsprop.torch`."""

import warnings

import numpy as np
import pytest
import rmsprop
import torch


def test_modules():
    """A warning at construction, and no other."""
    net = torch.nn.Linear(3, 2)
    with pytest.warns(UserWarning, match=r"rmsprop\.torch\.RMSprop") as found:
        opt = rmsprop.RMSprop(net.parameters())
    assert len(found) == 1
    assert found[0].filename == __file__
    opt.step(grads=[torch.ones(2, 3), torch.ones(2)])


@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy, rmsprop.Parameter])
def test_others(wrap):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rmsprop.RMSprop([wrap(np.ones(3, np.float32))])


def test_at_hand(run_python):
    """Importing the package imports no torch; asking for the module does."""
    run_python(
        "import rmsprop, sys\n"
        "assert 'torch' not in sys.modules\n"
        "assert rmsprop.torch.RMSprop is sys.modules['rmsprop.torch'].RMSprop\n"
        "try: rmsprop.jax\n"
        "except AttributeError as error: assert 'jax' in str(error)\n"
        "else: raise SystemExit(1)\n"
    )
