"""A run of another framework goes on here, and one from here goes on there, as if it had never moved.

Keras, Optax and timm run beside; Paddle, TensorFlow 1 and OneFlow were recorded.
"""

import copy
import json
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import rmsprop
import torch
from oracle import Oracle
from problems import SHAPES, bits, random_arrays
from rmsprop import RMSprop, convert, dialect
from rmsprop.torch import RMSprop as TorchRMSprop

os.environ.setdefault("KERAS_BACKEND", "jax")
# Keras's own variables.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
GOLDENS = Path(__file__).with_name("goldens")
NAMES = ("a", "b/kernel", "b/scale", "c")
BEFORE, AFTER = 4, 10


# --- the frameworks ---------------------------------------------------------------------------


class Live:
    @classmethod
    def of(cls, params, state_dict):
        return cls(params, convert.arguments(cls.__name__.lower(), state_dict))


class Keras(Live):
    ulps = 1
    options = (
        {},
        {"momentum": 0.9, "centered": True, "rho": 0.95},
        {"weight_decay": 0.01, "epsilon": 1e-5},
    )

    def __init__(self, params, options):
        import keras

        self.keras = keras
        self.variables = [keras.Variable(p) for p in params]
        self.opt = keras.optimizers.RMSprop(**{"learning_rate": 0.01, **options})
        self.opt.build(self.variables)

    def step(self, grads):
        tensors = [self.keras.ops.convert_to_tensor(g) for g in grads]
        self.opt.apply(tensors, self.variables)

    def params(self):
        return [np.array(v.value) for v in self.variables]

    def leave(self):
        return convert.from_keras(self.opt.variables, self.opt.get_config())

    def arrive(self, state_dict):
        values = convert.to_keras(state_dict, self.opt.variables)
        for variable, value in zip(self.opt.variables, values, strict=True):
            variable.assign(value)


class Optax(Live):
    ulps = 2
    options = (
        {},
        {"momentum": 0.9, "centered": True, "decay": 0.95},
        {"momentum": 0.9, "nesterov": True, "bias_correction": True},
        {"eps_in_sqrt": False, "initial_scale": 1.0},
    )

    def __init__(self, params, options):
        import jax
        import optax

        self.optax = optax
        a, kernel, scale, c = map(jax.numpy.asarray, params)
        self.values = {"c": c, "b": {"scale": scale, "kernel": kernel}, "a": a}
        self.options = {"learning_rate": 0.01, **options}
        self.opt = optax.rmsprop(**self.options)
        self.state = self.opt.init(self.values)

    def step(self, grads):
        a, kernel, scale, c = grads
        tree = {"a": a, "b": {"kernel": kernel, "scale": scale}, "c": c}
        updates, self.state = self.opt.update(tree, self.state)
        self.values = self.optax.apply_updates(self.values, updates)

    def params(self):
        inner = self.values["b"]
        leaves = (self.values["a"], inner["kernel"], inner["scale"], self.values["c"])
        return [np.array(leaf) for leaf in leaves]

    def leave(self):
        return convert.from_optax(self.state, **self.options)

    def arrive(self, state_dict):
        self.state = convert.to_optax(state_dict, self.state)


class Timm(Live):
    ulps = 1
    options = (
        {},
        {"momentum": 0.9, "centered": True, "weight_decay": 0.01},
        {"momentum": 0.9, "lr_in_momentum": False, "alpha": 0.99},
        {"weight_decay": 0.01, "decoupled_decay": True},
        {"weight_decay": 0.1, "decoupled_decay": True, "corrected_weight_decay": True},
    )

    def __init__(self, params, options):
        from timm.optim import RMSpropTF

        self.tensors = [torch.nn.Parameter(torch.tensor(p)) for p in params]
        self.opt = RMSpropTF(self.tensors, **{"lr": 0.01, **options})

    def step(self, grads):
        for tensor, grad in zip(self.tensors, grads, strict=True):
            tensor.grad = torch.tensor(grad)
        self.opt.step()

    def params(self):
        return [t.detach().numpy().copy() for t in self.tensors]

    def leave(self):
        return convert.from_timm(copy.deepcopy(self.opt.state_dict()))

    def arrive(self, state_dict):
        self.opt.load_state_dict(convert.to_timm(state_dict, array=torch.from_numpy))


class Ours:
    """The array class; its parameters have names, in another order than Optax's leaves."""

    def __init__(self, params, options):
        self.arrays = [np.array(p) for p in params]
        self.opt = RMSprop(dict(zip(NAMES, self.arrays, strict=True)), **options)

    def step(self, grads):
        self.opt.step(grads=dict(zip(NAMES, grads, strict=True)))

    def params(self):
        return [np.array(array) for array in self.arrays]


class OursInTorch:
    def __init__(self, params, options):
        self.tensors = [torch.nn.Parameter(torch.tensor(p)) for p in params]
        self.opt = TorchRMSprop(self.tensors, **options)

    step = Timm.step
    params = Timm.params


LIVE = [
    pytest.param(peer, options, id=f"{peer.__name__.lower()}-{index}")
    for peer in (Keras, Optax, Timm)
    for index, options in enumerate(peer.options)
]


def grads_of(t):
    return random_arrays((17, t), SHAPES)


def train(run, steps):
    for t in steps:
        run.step(grads_of(t))
    return run.params()


def distance(found, wanted):
    """In units of the last place of the largest element of each array."""
    pairs = zip(found, wanted, strict=True)
    return max(np.abs(f - w).max() / np.spacing(np.abs(w).max()) for f, w in pairs)


@pytest.mark.parametrize("ours", [Ours, OursInTorch])
@pytest.mark.parametrize(("peer", "options"), LIVE)
def test_goes_on_here(peer, options, ours):
    """And would not without its state, nor with the options of another framework."""
    theirs = peer(random_arrays(3), options)
    params = train(theirs, range(BEFORE))
    state_dict = theirs.leave()
    wanted = train(theirs, range(BEFORE, BEFORE + AFTER))

    def go_on(change=lambda _: None):
        changed = {
            "state": {k: dict(v) for k, v in state_dict["state"].items()},
            "param_groups": [dict(group) for group in state_dict["param_groups"]],
        }
        change(changed)
        here = ours(params, dialect("torch", lr=5.0, momentum=0.0))
        here.opt.load_state_dict(changed)
        return distance(train(here, range(BEFORE, BEFORE + AFTER)), wanted)

    assert go_on() <= peer.ulps * AFTER
    assert go_on(lambda changed: changed["state"].clear()) > 1000
    assert go_on(lambda changed: changed["param_groups"][0].update(lr=0.011)) > 1000


@pytest.mark.parametrize(("peer", "options"), LIVE)
def test_goes_on_there(peer, options):
    """A run from here, with the arguments that it is given there."""
    start = peer(random_arrays(3), options).leave()["param_groups"][0]
    formula = {k: v for k, v in start.items() if k in (*dialect("torch"), "lr")}
    here = Ours(random_arrays(3), formula)
    params = train(here, range(BEFORE))
    state_dict = here.opt.state_dict()
    wanted = train(here, range(BEFORE, BEFORE + AFTER))
    there = peer.of(params, state_dict)
    there.arrive(state_dict)
    found = train(there, range(BEFORE, BEFORE + AFTER))
    assert distance(found, wanted) <= peer.ulps * AFTER
    fresh = train(peer.of(params, state_dict), range(BEFORE, BEFORE + AFTER))
    assert distance(fresh, wanted) > 1000


@pytest.mark.parametrize(("peer", "options"), LIVE)
def test_there_and_back(peer, options):
    """Not a bit is lost."""
    theirs = peer(random_arrays(3), options)
    params = train(theirs, range(BEFORE))
    state_dict = theirs.leave()
    again = peer.of(params, state_dict)
    again.arrive(
        {
            "state": {
                index: {k: np.asarray(v) if k != "step" else v for k, v in e.items()}
                for index, e in state_dict["state"].items()
            },
            "param_groups": state_dict["param_groups"],
        }
    )
    both = [train(run, range(BEFORE, BEFORE + AFTER)) for run in (theirs, again)]
    assert bits(both[0]) == bits(both[1])


# --- Keras ------------------------------------------------------------------------------------


def keras_run(**options):
    run = Keras(random_arrays(3), options)
    train(run, range(BEFORE))
    return run


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"centered": True}], ids=str
)
def test_keras_weights_file(tmp_path, options):
    """Variables without paths, as `.weights.h5` has them."""
    import h5py
    import keras

    layers = [keras.layers.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.RMSprop(0.01, **options), "mse")
    model.fit(np.ones((8, 3)), np.ones((8, 2)), verbose=0)
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    config = model.optimizer.get_config()
    wanted = convert.from_keras(model.optimizer.variables, config)
    with h5py.File(path) as file:
        found = convert.from_keras(file["optimizer/vars"], config)
    assert bits(found["state"]) == bits(wanted["state"])
    assert found["param_groups"] == wanted["param_groups"]
    assert found["state"][0]["step"] == 1


@pytest.mark.parametrize(
    "option",
    [
        {"clipnorm": 1.0},
        {"global_clipnorm": 1.0},
        {"clipvalue": 1.0},
        {"use_ema": True},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_keras_refuses_what_is_no_part_of_the_rule(option):
    run = Keras(random_arrays(3), option)
    (key,) = option
    with pytest.raises(ValueError, match=f"expected no {key}"):
        run.leave()


def test_keras_schedules():
    """The number that counts at the next step must be given."""
    import keras

    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    run = Keras(random_arrays(3), {"learning_rate": schedule})
    train(run, range(2))
    config = run.opt.get_config()
    with pytest.raises(ValueError, match="learning_rate: expected a number"):
        convert.from_keras(run.opt.variables, config)
    config["learning_rate"] = 0.05
    found = convert.from_keras(run.opt.variables, config)
    assert found["param_groups"][0]["lr"] == 0.05
    positional = {str(i): v.numpy() for i, v in enumerate(run.opt.variables)}
    assert bits(convert.from_keras(positional, config)["state"]) == bits(found["state"])


def test_keras_variables_of_another_optimizer():
    import keras

    variables = [keras.Variable(p) for p in random_arrays(3)]
    adam = keras.optimizers.Adam()
    adam.build(variables)
    with pytest.raises(ValueError, match="expected variables of"):
        convert.from_keras(adam.variables, {})
    with pytest.raises(ValueError, match="expected the variables of an optimizer"):
        convert.from_keras([], {})
    run = keras_run()
    with pytest.raises(ValueError, match="as many arrays of each kind"):
        convert.from_keras(run.opt.variables, {"momentum": 0.9})
    with pytest.raises(ValueError, match="expected 4 parameters, got 0"):
        convert.to_keras(run.leave(), [])


# --- Optax ------------------------------------------------------------------------------------


def test_optax_injected_hyperparameters():
    import jax
    import optax

    params = {"w": jax.numpy.ones(3)}
    make = optax.inject_hyperparams(optax.rmsprop)
    opt = make(learning_rate=0.25, decay=0.5, momentum=0.75)
    state = opt.init(params)
    _, state = opt.update({"w": jax.numpy.ones(3)}, state)
    found = convert.from_optax(state)
    (group,) = found["param_groups"]
    assert (group["lr"], group["alpha"], group["momentum"]) == (0.25, 0.5, 0.75)
    assert group["param_names"] == ["w"]
    again = convert.to_optax(found, opt.init(params))
    assert bits(jax.tree.leaves(again)) == bits(jax.tree.leaves(state))


def test_optax_trees():
    """Mappings by sorted keys, as in JAX, but for ordered ones; sequences by index; None is nothing."""
    import jax
    import optax

    leaf = jax.numpy.zeros
    tree = {
        "z": [leaf(1), None, (leaf(2), leaf(3))],
        "a": OrderedDict(y=leaf(4), x=leaf(5)),
    }
    state = optax.rmsprop(0.1).init(tree)
    found = convert.from_optax(state, learning_rate=0.1)
    paths, _ = jax.tree.flatten_with_path(tree)
    wanted = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths]
    assert found["param_groups"][0]["param_names"] == wanted
    again = convert.to_optax(found, state)
    assert jax.tree.structure(again) == jax.tree.structure(state)


def test_optax_states_of_something_else():
    import jax
    import optax

    params = {"w": jax.numpy.ones(3)}
    with pytest.raises(ValueError, match="expected the state of optax.rmsprop"):
        convert.from_optax(optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="MultiStepsState"):
        convert.from_optax(optax.MultiSteps(optax.rmsprop(0.1), 2).init(params))
    with pytest.raises(ValueError, match="none with the field nu"):
        convert.from_optax(optax.sgd(0.1, momentum=0.9).init(params))
    with pytest.raises(ValueError, match="momentum=0.9 as the state was made with"):
        convert.from_optax(optax.rmsprop(0.1).init(params), momentum=0.9)
    with pytest.raises(TypeError, match="expected hyperparameters of .* got 'rho'"):
        convert.from_optax(optax.rmsprop(0.1).init(params), rho=0.9)
    opt = RMSprop({"v": np.ones(3)}, **dialect("optax"))
    with pytest.raises(ValueError, match=r"expected leaves at \['v'\], got \['w'\]"):
        convert.to_optax(opt.state_dict(), optax.rmsprop(0.1).init(params))


def test_optax_inside_a_chain():
    """Of parts without arrays it may be one."""
    import jax
    import optax

    params = {"w": jax.numpy.ones(3)}
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(0.1))
    found = convert.from_optax(chain.init(params), learning_rate=0.1)
    assert found["param_groups"][0]["param_names"] == ["w"]


# --- timm -------------------------------------------------------------------------------------


def test_timm_refuses_what_is_no_part_of_the_rule():
    run = Timm(random_arrays(3), {"caution": True})
    with pytest.raises(ValueError, match="timm group 0: expected no caution"):
        run.leave()


def test_timm_without_a_first_lr():
    """A checkpoint of a version that did not write it down."""
    options = {"decoupled_decay": True, "corrected_weight_decay": True}
    state_dict = Timm(random_arrays(3), options).opt.state_dict()
    del state_dict["param_groups"][0]["max_lr_snapshot"]
    with pytest.raises(ValueError, match="timm: expected max_lr_snapshot"):
        convert.from_timm(state_dict)


def test_timm_decays_by_a_scheduled_lr():
    """`corrected_weight_decay`, there and back, with a learning rate that has fallen."""
    options = {"weight_decay": 0.1, "decoupled_decay": True}
    there = Timm(random_arrays(3), {**options, "corrected_weight_decay": True})
    there.opt.param_groups[0]["lr"] = 0.002
    train(there, range(BEFORE))
    here = Ours(there.params(), {"lr": 1.0})
    here.opt.load_state_dict(there.leave())
    assert here.opt.param_groups[0]["initial_lr"] == 0.01
    back = Timm(there.params(), options)
    back.arrive(here.opt.state_dict())
    assert back.opt.param_groups[0]["max_lr_snapshot"] == 0.01
    for run in (there, here, back):
        train(run, range(BEFORE, BEFORE + 10))
    assert distance(here.params(), there.params()) <= 10
    assert bits(back.params()) == bits(there.params())


def test_timm_from_the_torch_front():
    """Tensors go as they are, and a scheduler's `initial_lr` and other keys of the user stay."""
    here = OursInTorch(random_arrays(3), dialect("timm", lr=0.01, momentum=0.9))
    torch.optim.lr_scheduler.StepLR(here.opt, 3)
    here.opt.param_groups[0]["layer"] = "head"
    train(here, range(BEFORE))
    there = Timm(here.params(), {"momentum": 0.9})
    # Torch shares the tensors of a state_dict.
    state_dict = copy.deepcopy(here.opt.state_dict())
    there.opt.load_state_dict(convert.to_timm(state_dict))
    (group,) = there.opt.param_groups
    assert (group["initial_lr"], group["layer"]) == (0.01, "head")
    both = [train(run, range(BEFORE, BEFORE + AFTER)) for run in (here, there)]
    assert distance(*both) <= AFTER


# --- what another framework cannot compute ----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("keras", {"eps_in_sqrt": False}, "eps_in_sqrt of group 0: expected True"),
        ("keras", {"nesterov": True, "momentum": 0.9}, "nesterov of group 0"),
        ("keras", {"weight_decay": 0.1}, "decoupled_weight_decay of group 0"),
        ("optax", {"weight_decay": 0.1}, "weight_decay of group 0: expected 0.0"),
        ("tf1", {"maximize": True}, "maximize of group 0: expected False"),
        ("timm", {"bias_correction": True}, "bias_correction of group 0"),
        ("timm", {"clip_weights": 0.1}, "clip_weights of group 0: expected None"),
        ("paddle", {"lr_in_momentum": False, "momentum": 0.9}, "lr_in_momentum"),
        ("oneflow", {"momentum": 0.9}, "momentum of group 0: expected 0.0"),
    ],
)
def test_rules_that_a_framework_does_not_have(name, options, match):
    opt = RMSprop([np.ones(3)], **{**dialect("oneflow"), **options})
    state_dict = opt.state_dict()
    ways = {
        "keras": lambda: convert.to_keras(state_dict, []),
        "optax": lambda: convert.to_optax(state_dict, ()),
        "tf1": lambda: convert.to_tf1(state_dict, ["w"]),
        "timm": lambda: convert.to_timm(state_dict),
        "paddle": lambda: convert.to_paddle(state_dict, ["w"]),
        "oneflow": lambda: convert.to_oneflow(state_dict),
    }
    for way in (ways[name], lambda: convert.arguments(name, state_dict)):
        with pytest.raises(ValueError, match=match):
            way()


def test_options_that_are_off_do_not_matter():
    """`lr_in_momentum` without momentum, the kind of weight decay without any."""
    opt = RMSprop([np.ones(3)], **dialect("oneflow", lr_in_momentum=False))
    assert convert.arguments("keras", opt.state_dict())["rho"] == 0.99


def test_one_value_for_all_groups():
    groups = [{"params": [np.ones(3)]}, {"params": [np.ones(3)], "lr": 0.5}]
    state_dict = RMSprop(groups, **dialect("keras")).state_dict()
    with pytest.raises(ValueError, match="lr: expected one value for all groups"):
        convert.arguments("keras", state_dict)


def test_unknown_names():
    state_dict = RMSprop([np.ones(3)]).state_dict()
    with pytest.raises(ValueError, match="name: expected one of keras, optax"):
        convert.arguments("adam", state_dict)
    with pytest.raises(TypeError, match="names: expected a sequence"):
        convert.to_tf1(state_dict, "w")


# --- recorded ---------------------------------------------------------------------------------


class Recorded:
    """A run of a framework: `before` steps, its checkpoint, what came after; and how it went on from ours."""

    def __init__(self, path):
        self.file = np.load(path)
        about = json.loads(str(self.file["config"]))
        self.peer, self.options = about["peer"], about["options"]
        self.variables = dict(zip(NAMES, about["variables"], strict=True))
        self.before, self.steps = about["before"], about["steps"]

    def arrays(self, key):
        return [self.file[f"{key}_{i}"] for i in range(len(SHAPES))]

    def checkpoint(self, key):
        prefix = f"{key}:"
        names = [name for name in self.file.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.file[name] for name in names}

    def leave(self):
        read = {"tf1": convert.from_tf1, "paddle": convert.from_paddle}[self.peer]
        return read(self.checkpoint("theirs"), self.variables, **self.options)


RECORDED = sorted(GOLDENS.glob("continued/*.npz"))
ULPS = {"tf1": 0.75, "paddle": 1}


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_runs_go_on_here(path):
    run = Recorded(path)
    here = Ours(run.arrays(f"p{run.before}"), {})
    here.opt.load_state_dict(run.leave())
    for t in range(run.before, run.steps):
        here.step(run.arrays(f"g{t}"))
    found, wanted = here.params(), run.arrays(f"p{run.steps}")
    assert distance(found, wanted) <= ULPS[run.peer] * (run.steps - run.before)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_runs_go_on_there(path):
    """What they were given is what we give them today, bit for bit."""
    run = Recorded(path)
    formula = {
        k: v
        for k, v in run.leave()["param_groups"][0].items()
        if k in (*dialect("torch"), "lr")
    }
    here = Ours(run.arrays("p0"), formula)
    for t in range(run.before):
        here.step(run.arrays(f"g{t}"))
    write = {"tf1": convert.to_tf1, "paddle": convert.to_paddle}[run.peer]
    given = write(here.opt.state_dict(), run.variables)
    assert bits(given) == bits(run.checkpoint("ours"))
    for t in range(run.before, run.steps):
        here.step(run.arrays(f"g{t}"))
    found, wanted = run.arrays("back"), here.params()
    assert distance(found, wanted) <= ULPS[run.peer] * (run.steps - run.before)


def test_missing_state():
    run = Recorded(next(path for path in RECORDED if "tf1" in path.stem))
    checkpoint = run.checkpoint("theirs")
    with pytest.raises(ValueError, match="tf1: expected 'w/RMSProp', got"):
        convert.from_tf1(checkpoint, ["w"])
    with pytest.raises(ValueError, match="paddle: expected 'w_mean_square', got"):
        convert.from_paddle(checkpoint, ["w"])


def test_oneflow_goes_on_here():
    """Its golden files have the state at the end alone; that in between is the oracle's."""
    for path in sorted(GOLDENS.glob("oneflow_*.npz")):
        file = np.load(path)
        config = json.loads(str(file["config"]))
        if config.get("clip_grad_max_norm") is not None or config["dtype"] != "float32":
            continue
        rounded = {
            key: float(np.float32(config[key]))
            for key in ("lr", "alpha", "eps", "weight_decay")
        }
        options = {**rounded, "centered": config["centered"]}
        count, before, steps = len(SHAPES), 2, 12

        def arrays(key, file=file, count=count):
            return [file[f"{key}_{i}"] for i in range(count)]

        oracle = Oracle(
            [p.copy() for p in arrays("p0")], **dialect("oneflow", **options)
        )
        for t in range(before):
            oracle.step(arrays(f"g{t}"))
        keys = ["square_avg", *(["grad_avg"] if options["centered"] else [])]
        state = {i: {k: oracle.state[i][k] for k in keys} for i in range(count)}
        theirs = {
            "state": {"step": before, **state},
            "param_groups": [
                {**options, "contiguous_params": False, "_enable_clip_grad": False}
                | {"params": list(range(count))}
            ],
        }
        state_dict = convert.from_oneflow(theirs)
        here = Ours(arrays(f"p{before}"), {})
        here.opt.load_state_dict(state_dict)
        again = convert.to_oneflow(here.opt.state_dict())
        assert bits(again["state"]) == bits(theirs["state"])
        for key, value in theirs["param_groups"][0].items():
            assert again["param_groups"][0][key] == value
        for t in range(before, steps):
            here.step(arrays(f"g{t}"))
        assert distance(here.params(), arrays(f"p{steps}")) <= steps - before
        for key in keys:
            found = [entry[key] for entry in here.opt.state.values()]
            assert distance(found, arrays(f"state_{key}")) <= steps - before


def test_oneflow_refuses_flat_buffers():
    with pytest.raises(ValueError, match="expected no contiguous_params"):
        convert.from_oneflow(
            {"state": {}, "param_groups": [{"contiguous_params": True, "params": [0]}]}
        )


# --- the table in the documentation -----------------------------------------------------------


def test_documented_names():
    """The table of the module names every hyperparameter and state of each framework."""
    text = " ".join(rmsprop.convert.__doc__.split())
    for peer in convert._PEERS.values():
        for names in (peer.options, peer.state):
            if names is not convert._TORCH_STATE:
                assert set(names) <= set(text.replace(",", "").split()) | {
                    "lr",
                    "alpha",
                }
