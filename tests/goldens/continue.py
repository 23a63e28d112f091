"""Records runs that move between a framework and rmsprop, for tests/test_convert.py.

    python tests/goldens/continue.py --peer tf1 --out tests/goldens/continued

A file holds a run of the framework (parameters `p{t}_i` before and after all steps, the
gradients `g{t}_i`), its checkpoint after `before` steps (`theirs:<key>`), the checkpoint
that `rmsprop.convert` makes of a run of ours with the same numbers (`ours:<key>`), and
the parameters that the framework reached from that one (`back_i`). README.md beside this
file says what to install for each framework; rmsprop must be importable as well.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rmsprop import RMSprop, convert, dialect

SHAPES = ((7, 5), (11,), (), (2, 3, 4))
OURS = ("a", "b/kernel", "b/scale", "c")
BEFORE, STEPS = 3, 13
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "tf1": [
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "momentum": 0.9, "decay": 0.95},
        {"learning_rate": 0.01, "momentum": 0.9, "centered": True, "epsilon": 1e-3},
    ],
    "paddle": [
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "momentum": 0.9, "centered": True, "rho": 0.9},
        {"learning_rate": 0.01, "weight_decay": 0.01, "epsilon": 1e-4},
    ],
}
Arrays = list[np.ndarray]


class TF1:
    """`tf.compat.v1.train.RMSPropOptimizer` in a session."""

    def __init__(self, params: Arrays, options: dict[str, Any]) -> None:
        import tensorflow as tf

        self.tf, v1 = tf, tf.compat.v1
        self.version = tf.__version__
        self.names = [f"net/{name.replace('/', '_')}" for name in OURS]
        self.graph = tf.Graph()
        with self.graph.as_default():
            self.session = v1.Session()
            self.variables = [
                v1.get_variable(name, initializer=p)
                for name, p in zip(self.names, params)
            ]
            self.inputs = [v1.placeholder(p.dtype, p.shape) for p in params]
            opt = v1.train.RMSPropOptimizer(**options)
            pairs = list(zip(self.inputs, self.variables))
            self.train = opt.apply_gradients(pairs)
            self.session.run(v1.global_variables_initializer())
            self.saver = v1.train.Saver()

    def step(self, grads: Arrays) -> None:
        self.session.run(self.train, dict(zip(self.inputs, grads)))

    def params(self) -> Arrays:
        return [np.array(p) for p in self.session.run(self.variables)]

    def checkpoint(self, folder: Path) -> dict[str, np.ndarray]:
        path = str(folder / "tf1")
        with self.graph.as_default():
            self.saver.save(self.session, path)
        reader = self.tf.train.load_checkpoint(path)
        return {
            name: np.array(reader.get_tensor(name))
            for name in sorted(reader.get_variable_to_shape_map())
            if "RMSProp" in name
        }

    def load(self, state_dict: dict[str, Any]) -> dict[str, np.ndarray]:
        slots = convert.to_tf1(state_dict, dict(zip(OURS, self.names)))
        with self.graph.as_default():
            by_name = {
                v.name.removesuffix(":0"): v
                for v in self.tf.compat.v1.global_variables()
            }
            for name, value in slots.items():
                by_name[name].load(value, self.session)
        return slots


class Paddle:
    """`paddle.optimizer.RMSProp`."""

    def __init__(self, params: Arrays, options: dict[str, Any]) -> None:
        import paddle

        self.paddle, self.version = paddle, paddle.__version__
        self.tensors = [
            paddle.base.framework.EagerParamBase.from_tensor(paddle.to_tensor(p))
            for p in params
        ]
        for tensor, name in zip(self.tensors, OURS):
            tensor.name = f"net.{name.replace('/', '_')}"
        self.names = [tensor.name for tensor in self.tensors]
        self.opt = paddle.optimizer.RMSProp(parameters=self.tensors, **options)

    def step(self, grads: Arrays) -> None:
        self.opt.clear_grad()
        pairs = zip(self.tensors, grads)
        sum((t * self.paddle.to_tensor(g)).sum() for t, g in pairs).backward()
        # Its state is made at the first step, with a number for each optimizer of a process.
        with self.paddle.utils.unique_name.guard():
            self.opt.step()

    def params(self) -> Arrays:
        return [t.numpy().copy() for t in self.tensors]

    def checkpoint(self, folder: Path) -> dict[str, np.ndarray]:
        path = str(folder / "paddle.pdopt")
        self.paddle.save(self.opt.state_dict(), path)
        found = self.paddle.load(path)
        return {key: value.numpy() for key, value in found.items()}

    def load(self, state_dict: dict[str, Any]) -> dict[str, np.ndarray]:
        names = dict(zip(OURS, self.names))
        given = convert.to_paddle(state_dict, names, array=self.paddle.to_tensor)
        self.opt.set_state_dict(given)
        return convert.to_paddle(state_dict, names)


PEERS = {"tf1": TF1, "paddle": Paddle}


def record(peer: str, options: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(options))
    draw = lambda: [np.array(rng.normal(size=s), np.float32) for s in SHAPES]
    start, grads = draw(), [draw() for _ in range(STEPS)]
    new = {f"g{t}_{i}": g for t, step in enumerate(grads) for i, g in enumerate(step)}

    theirs = PEERS[peer](start, options)
    for t in range(STEPS + 1):
        new |= {f"p{t}_{i}": p for i, p in enumerate(theirs.params())}
        if t == BEFORE:
            checkpoint = theirs.checkpoint(folder)
            new |= {f"theirs:{key}": value for key, value in checkpoint.items()}
        if t < STEPS:
            theirs.step(grads[t])

    known = dict(zip(OURS, theirs.names))
    read = {"tf1": convert.from_tf1, "paddle": convert.from_paddle}[peer]
    group = read(checkpoint, known, **options)["param_groups"][0]
    formula = {k: v for k, v in group.items() if k in (*dialect("torch"), "lr")}
    params = dict(zip(OURS, (np.array(p) for p in start)))
    ours = RMSprop(params, **formula)
    for t in range(BEFORE):
        ours.step(grads=dict(zip(OURS, grads[t])))
    back = PEERS[peer]([np.array(p) for p in params.values()], options)
    given = back.load(ours.state_dict())
    new |= {f"ours:{key}": np.asarray(value) for key, value in given.items()}
    for t in range(BEFORE, STEPS):
        back.step(grads[t])
    new |= {f"back_{i}": p for i, p in enumerate(back.params())}

    about = {"peer": peer, "version": theirs.version, "options": options}
    about |= {"variables": theirs.names, "before": BEFORE, "steps": STEPS}
    return new | {"config": np.array(json.dumps(about))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=sorted(PEERS), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for index, options in enumerate(OPTIONS[arguments.peer], start=1):
        with tempfile.TemporaryDirectory() as folder:
            new = record(arguments.peer, options, Path(folder))
        path = arguments.out / f"{arguments.peer}_{index:02}.npz"
        np.savez(path, **new)
        print(path)


if __name__ == "__main__":
    main()
