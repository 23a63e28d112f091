"""`save` and `load` put a training into one file and back, bit for bit; a file is the old one or the new one, whole."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path

import numpy as np
import pytest
import rmsprop
import torch
from problems import NAMES, bits, random_arrays, snapshot
from rmsprop import RMSprop, load, save
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

EXAMPLE = Path(__file__).parents[1] / "examples" / "resume.py"
OPTIONS = {"momentum": 0.9, "centered": True, "lr": 0.01, "weight_decay": 1e-3}


def named(seed, dtype=np.float32):
    return dict(zip(NAMES, random_arrays(seed, dtype=dtype), strict=True))


def step(opt, params, seeds):
    for seed in seeds:
        opt.step(grads=random_arrays((9, seed), [np.shape(p) for p in params]))


def trained(**options):
    params = named(0)
    opt = RMSprop(params, **{**OPTIONS, **options})
    step(opt, params.values(), range(3))
    return params, opt


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


# --- there and back ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("is_named", [False, True])
def test_continues_bit_for_bit(path, dtype, is_named):
    def build(seed, lr):
        params = named(seed, dtype)
        given = list(params.items() if is_named else params.values())
        groups = [{"params": given[:2]}, {"params": given[2:], "lr": lr, "note": "x"}]
        return list(params.values()), RMSprop(groups, **OPTIONS)

    params, opt = build(0, 0.003)
    step(opt, params, range(3))
    before = snapshot(opt)
    save(path, opt, metadata={"epoch": "7"})
    assert snapshot(opt) == before
    other_params, other = build(1, 5.0)
    assert load(path, other) == {"epoch": "7"}
    assert snapshot(other) == before
    for one, its in ((opt, params), (other, other_params)):
        step(one, its, range(3, 6))
    assert snapshot(other) == snapshot(opt)


def test_is_plain_safetensors(path):
    """Another program finds tensors by role and name, and the groups in the metadata."""
    params, opt = trained()
    save(path, opt)
    found = load_file(path)
    roles = ("param", "step", "square_avg", "grad_avg", "momentum_buffer")
    assert set(found) == {f"{role}/{name}" for role in roles for name in NAMES}
    for index, (name, param) in enumerate(params.items()):
        assert bits(found[f"param/{name}"]) == bits(param)
        assert found[f"step/{name}"] == 3
        for role in roles[2:]:
            assert bits(found[f"{role}/{name}"]) == bits(opt.state[index][role])
    with safe_open(path, framework="numpy") as file:
        notes = file.metadata()
    assert notes["rmsprop"] == rmsprop.__version__
    (group,) = json.loads(notes["param_groups"])
    assert (group["lr"], group["param_names"]) == (0.01, list(NAMES))


def test_goes_by_name(path):
    params, opt = trained()
    save(path, opt)
    order = list(reversed(NAMES))
    other = {name: np.zeros_like(params[name]) for name in order}
    opt_other = RMSprop(other, **OPTIONS)
    load(path, opt_other)
    assert bits(other) == bits({name: params[name] for name in order})
    where = {name: index for index, name in enumerate(NAMES)}
    for index, name in enumerate(order):
        assert bits(dict(opt_other.state[index])) == bits(dict(opt.state[where[name]]))


@pytest.mark.parametrize("label", ["", "a/b", "step/a", 'é\n"', "__metadata__", "3"])
def test_any_name(path, label):
    params = {label: np.ones(3), "other": np.ones((2, 2))}
    opt = RMSprop(params)
    step(opt, params.values(), [0])
    before = snapshot(opt)
    save(path, opt)
    step(opt, params.values(), [1])
    load(path, opt)
    assert snapshot(opt) == before


def test_every_kind_of_parameter(path):
    """Strided and Fortran arrays, Parameters, buffers, torch's tensors: written in place."""
    wide = np.arange(24.0).reshape(4, 6)
    params = [
        wide[:, ::2],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        rmsprop.Parameter(np.arange(4, dtype=np.float32)),
        array("f", [1, 2, 3]),
        torch.arange(5.0),
        np.zeros((0, 3)),
    ]
    opt = RMSprop(params)

    def now():
        arrays = [p.numpy() if isinstance(p, torch.Tensor) else p for p in params]
        return bits([np.array(array) for array in arrays])

    before = now()
    save(path, opt)
    opt.lr = 1.0
    opt.step(grads=[np.ones(np.shape(param)) for param in params])
    assert now() != before
    load(path, opt)
    assert now() == before
    assert (wide[:, 1::2] == np.arange(24.0).reshape(4, 6)[:, 1::2]).all()


def test_numbers_of_other_libraries(path):
    """A learning rate of NumPy or torch is saved as the number that it is."""
    params = named(0)
    opt = RMSprop([{"params": params, "lr": np.float32(0.1), "eps": np.float64(1e-6)}])
    save(path, opt)
    other = RMSprop(named(0))
    load(path, other)
    assert (other.lr, other.eps) == (float(np.float32(0.1)), 1e-6)


@pytest.mark.parametrize("steps", [0, 2**53 + 1, 2**64 - 1])
def test_number_of_updates(path, steps):
    opt = RMSprop([np.ones(2)])
    opt.state[0]["step"] = steps
    save(path, opt)
    other = RMSprop([np.ones(2)])
    load(path, other)
    assert other.state[0]["step"] == steps


# --- what is refused --------------------------------------------------------------------------


def refused(path, opt, match, error=ValueError):
    before = snapshot(opt)
    with pytest.raises(error, match=match):
        load(path, opt)
    assert snapshot(opt) == before


def tampered(path, change):
    """Rewrites the file with other tensors or metadata."""
    with safe_open(path, framework="numpy") as file:
        notes = file.metadata()
    tensors = load_file(path)
    change(tensors, notes)
    save_file(tensors, path, metadata=notes)


CHANGES = {
    "a parameter is missing": (
        lambda t, _: t.pop("param/scale"),
        r"parameter 2 \('scale' in .*\): expected float32 of shape \(\), got none",
    ),
    "another shape": (
        lambda t, _: t.update({"param/conv.bias": np.ones(3, np.float32)}),
        r"expected float32 of shape \(11,\), got float32 of shape \(3,\)",
    ),
    "another dtype": (
        lambda t, _: t.update({"param/scale": np.ones(())}),
        r"expected float32 of shape \(\), got float64",
    ),
    "state of another shape": (
        lambda t, _: t.update({"square_avg/scale": np.ones(3, np.float32)}),
        "square_avg of parameter 2",
    ),
    "an unknown parameter": (
        lambda t, _: t.update({"param/w": np.ones(3)}),
        "expected no tensor 'param/w'",
    ),
    "an unknown state": (
        lambda t, _: t.update({"speed/scale": np.ones((), np.float32)}),
        "speed",
    ),
    "no groups": (
        lambda _, n: n.pop("param_groups"),
        "expected a file of rmsprop.save",
    ),
    "groups that are none": (
        lambda _, n: n.update(param_groups="[1]"),
        "expected groups",
    ),
    "groups that are no JSON": (
        lambda _, n: n.update(param_groups="{"),
        "expected groups",
    ),
    "a bad option": (
        lambda _, n: n.update(
            param_groups=n["param_groups"].replace('"lr": 0.01', '"lr": -1')
        ),
        "lr of group 0",
    ),
}


@pytest.mark.parametrize(("change", "match"), CHANGES.values(), ids=CHANGES)
def test_a_file_that_does_not_fit(path, change, match):
    _, opt = trained()
    save(path, opt)
    tampered(path, change)
    step(opt, random_arrays(0), [8])
    refused(path, opt, match)


def test_another_layout_or_other_names(path):
    _, opt = trained()
    save(path, opt)
    arrays = random_arrays(0)
    refused(path, RMSprop([{"params": arrays[:1]}, {"params": arrays[1:]}]), "groups")
    other = dict(zip("abcd", random_arrays(0), strict=True))
    refused(path, RMSprop(other), "same names")


@pytest.mark.parametrize(
    "content", [b"", b"x" * 99, None], ids=["empty", "text", "cut"]
)
def test_files_of_something_else(path, content):
    _, opt = trained()
    save(path, opt)
    path.write_bytes(path.read_bytes()[:-8] if content is None else content)
    refused(path, opt, "expected safetensors")


def test_missing_files_and_folders(path):
    _, opt = trained()
    refused(path, opt, re.escape(str(path)), FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        save(path / "deeper", opt)
    with pytest.raises(IsADirectoryError):
        save(path.parent, opt)
    assert list(path.parent.iterdir()) == []


def test_read_only_parameters(path):
    params, opt = trained()
    save(path, opt)
    params["scale"].flags.writeable = False
    refused(path, opt, "parameter 2: expected a writable array")


def test_torch_optimizers_go_another_way(path):
    opt = torch.optim.RMSprop([torch.ones(3)])
    for function in (lambda: save(path, opt), lambda: load(path, opt)):
        with pytest.raises(TypeError, match=r"expected an rmsprop\.RMSprop, got torch"):
            function()


@pytest.mark.parametrize(
    "bad", [{"epoch": 7}, {7: "epoch"}, {"rmsprop": "x"}], ids=repr
)
def test_metadata_is_strings(path, bad):
    _, opt = trained()
    with pytest.raises((TypeError, ValueError), match="metadata: expected"):
        save(path, opt, metadata=bad)
    assert not path.exists()


def test_groups_that_json_cannot_hold(path):
    _, opt = trained()
    save(path, opt)
    old = path.read_bytes()
    opt.param_groups[0]["when"] = object()
    with pytest.raises(ValueError, match="when of group 0: expected what JSON"):
        save(path, opt)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


# --- one file or the other ---------------------------------------------------------------------


def test_a_link_stays_one(path):
    _, opt = trained()
    link = path.with_name("latest")
    path.write_bytes(b"old")
    link.symlink_to(path.name)
    save(link, opt)
    assert link.is_symlink()
    load(path, opt)


def test_permissions_are_those_of_any_new_file(path):
    _, opt = trained()
    save(path, opt)
    plain = path.with_name("plain")
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_disk_that_is_full(path, monkeypatch):
    _, opt = trained()
    save(path, opt)
    old = path.read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save(path, opt)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


KILLED = """
import itertools, sys
import numpy as np
from rmsprop import RMSprop, save

params = {f"p{i}": np.zeros(300_000, np.float32) for i in range(4)}
opt = RMSprop(params, lr=0.0, alpha=1.0)
for n in itertools.count(1):
    for index, param in enumerate(params.values()):
        param[...] = n
        opt.state[index]["square_avg"][...] = n
        opt.state[index]["step"] = n
    save(sys.argv[1], opt, metadata={"n": str(n)})
    print(n, flush=True)
"""


def test_killed_at_any_moment(path):
    """What is there afterwards is of one moment, and not of an earlier one than the last that was done."""
    params = {f"p{i}": np.zeros(300_000, np.float32) for i in range(4)}
    opt = RMSprop(params)
    for seed in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
        )
        done = int(process.stdout.readline())
        time.sleep(np.random.default_rng(seed).uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        done = max([done, *map(int, process.stdout.read().split())])
        process.wait()
        process.stdout.close()
        n = int(load(path, opt)["n"])
        assert n in (done, done + 1)
        for index, param in enumerate(params.values()):
            assert (param == n).all()
            assert (opt.state[index]["square_avg"] == n).all()
            assert opt.state[index]["step"] == n


# --- the example ------------------------------------------------------------------------------

EPOCHS = 8


def run_example(path, epochs=EPOCHS):
    finished = subprocess.run(
        [sys.executable, EXAMPLE, "--file", path, "--epochs", str(epochs)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return finished.stdout.splitlines()


def test_example_is_killed_and_goes_on(path):
    """Bit for bit; and not if a restored file is not what was saved."""
    *_, wanted = run_example(path)
    path.unlink()
    process = subprocess.Popen(
        [sys.executable, EXAMPLE, "--file", path, "--epochs", str(EPOCHS)],
        stdout=subprocess.PIPE,
        text=True,
    )
    seen = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert seen[-1].startswith("epoch 2:")
    half = path.read_bytes()
    first, *_, found = run_example(path)
    assert first.startswith("going on after")
    assert found == wanted

    def forget(tensors, _):
        for key in tensors:
            if key.startswith("square_avg/"):
                tensors[key] = np.zeros_like(tensors[key])

    path.write_bytes(half)
    tampered(path, forget)
    *_, broken = run_example(path)
    assert broken != wanted
