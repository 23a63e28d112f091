"""Record the golden trajectories anew, with the peers themselves.

    python tests/goldens/record.py --peer torch --out DIR [--compare]

Replays every stored file of one peer: the same hyperparameters, initial parameters and
gradients, handed to that peer's own released optimizer. The new files go to DIR, under
the stored names and with the version of the installed peer in their `config`.
`--compare` says how far each new file is from the stored one; only the recorded version
on a similar processor can be expected to repeat every bit.

README.md beside this file says what to install for each peer.
"""

import argparse
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = list[np.ndarray]
Options = dict[str, Any]
# The parameters after each step, and the peer's state after the last one.
Recording = tuple[list[Arrays], dict[str, Arrays]]

STORED = Path(__file__).parent


def record_torch(options: Options, params: Arrays, grads: list[Arrays]) -> Recording:
    import torch

    return _torch_like(torch, torch.optim.RMSprop, options, params, grads)


def record_timm(options: Options, params: Arrays, grads: list[Arrays]) -> Recording:
    import torch
    from timm.optim import RMSpropTF

    return _torch_like(torch, RMSpropTF, options, params, grads)


def record_sb3(options: Options, params: Arrays, grads: list[Arrays]) -> Recording:
    import torch
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

    return _torch_like(torch, RMSpropTFLike, options, params, grads)


def record_oneflow(options: Options, params: Arrays, grads: list[Arrays]) -> Recording:
    import oneflow

    clip = {key: options.pop(key) for key in list(options) if key.startswith("clip_")}
    if clip["clip_grad_max_norm"] is None:
        clip = {}
    return _torch_like(oneflow, oneflow.optim.RMSprop, options, params, grads, clip)


def _torch_like(
    framework: Any,
    optimizer: Callable[..., Any],
    options: Options,
    params: Arrays,
    grads: list[Arrays],
    clip: Options | None = None,
) -> Recording:
    tensors = [framework.nn.Parameter(framework.from_numpy(p)) for p in params]
    opt = optimizer([{"params": tensors} | (clip or {})], **options)
    steps = []
    for step in grads:
        for tensor, grad in zip(tensors, step):
            tensor.grad = framework.from_numpy(grad)
        if clip:
            opt.clip_grad()
        opt.step()
        steps.append([t.detach().numpy().copy() for t in tensors])
    state = opt.state if hasattr(opt, "state") else opt._state  # oneflow 0.9
    keys = [key for key in state[tensors[0]] if key != "step"]
    return steps, {key: [state[t][key].numpy() for t in tensors] for key in keys}


def record_keras(options: Options, params: Arrays, grads: list[Arrays]) -> Recording:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    opt = keras.optimizers.RMSprop(learning_rate=options.pop("lr"), **options)
    variables = [keras.Variable(p) for p in params]
    steps = []
    for step in grads:
        opt.apply([keras.ops.convert_to_tensor(g) for g in step], variables)
        steps.append([np.array(v.value) for v in variables])
    return steps, {}


def record_optax(options: Options, params: Arrays, grads: list[Arrays]) -> Recording:
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    opt = optax.rmsprop(options.pop("lr"), **options)
    values = [jax.numpy.asarray(p) for p in params]
    state = opt.init(values)
    steps = []
    for step in grads:
        updates, state = opt.update([jax.numpy.asarray(g) for g in step], state)
        values = optax.apply_updates(values, updates)
        steps.append([np.array(v) for v in values])
    return steps, {}


def record_mlx(options: Options, params: Arrays, grads: list[Arrays]) -> Recording:
    import mlx.core as mx
    from mlx.optimizers import RMSprop

    opt = RMSprop(learning_rate=options.pop("lr"), **options)
    values = {str(i): mx.array(p) for i, p in enumerate(params)}
    steps = []
    for step in grads:
        values = opt.apply_gradients(
            {str(i): mx.array(g) for i, g in enumerate(step)}, values
        )
        steps.append([np.array(v) for v in values.values()])
    return steps, {}


def record_paddle(options: Options, params: Arrays, grads: list[Arrays]) -> Recording:
    import paddle

    tensors = [paddle.to_tensor(p, stop_gradient=False) for p in params]
    opt = paddle.optimizer.RMSProp(
        learning_rate=options.pop("lr"), parameters=tensors, **options
    )
    steps = []
    for step in grads:
        opt.clear_grad()
        sum((t * paddle.to_tensor(g)).sum() for t, g in zip(tensors, step)).backward()
        opt.step()
        steps.append([t.numpy().copy() for t in tensors])
    return steps, {}


def record_tf1(options: Options, params: Arrays, grads: list[Arrays]) -> Recording:
    """TensorFlow 1's optimizer is its raw op; `ms` started at 1 there."""
    import tensorflow as tf

    variables = [tf.Variable(p) for p in params]
    names = ["mg", "ms", "mom"] if options["centered"] else ["ms", "mom"]
    start = {"ms": options["initial_ms"], "mom": 0, "mg": 0}
    slots = {
        name: [tf.Variable(np.full_like(p, start[name])) for p in params]
        for name in names
    }
    op = (
        tf.raw_ops.ResourceApplyCenteredRMSProp
        if options["centered"]
        else tf.raw_ops.ResourceApplyRMSProp
    )
    steps = []
    for step in grads:
        for i, (variable, grad) in enumerate(zip(variables, step)):
            hyperparameters = {
                "lr": options["lr"],
                "rho": options["decay"],
                "momentum": options["momentum"],
                "epsilon": options["epsilon"],
            }
            op(
                var=variable.handle,
                grad=tf.constant(grad),
                **{name: slots[name][i].handle for name in names},
                **{k: grad.dtype.type(v) for k, v in hyperparameters.items()},
            )
        steps.append([v.numpy().copy() for v in variables])
    return steps, {name: [s.numpy() for s in slots[name]] for name in names}


# Peer: how to record it, and the module that knows its version.
PEERS: dict[str, tuple[Callable[[Options, Arrays, list[Arrays]], Recording], str]] = {
    "keras": (record_keras, "keras"),
    "mlx": (record_mlx, "mlx.core"),
    "oneflow": (record_oneflow, "oneflow"),
    "optax": (record_optax, "optax"),
    "paddle": (record_paddle, "paddle"),
    "sb3": (record_sb3, "stable_baselines3"),
    "tf1": (record_tf1, "tensorflow"),
    "timm": (record_timm, "timm"),
    "torch": (record_torch, "torch"),
}


def record(stored: Path) -> dict[str, Any]:
    """Replay one stored file and return the contents of its successor."""
    old = np.load(stored)
    config = json.loads(str(old["config"]))
    record_peer, module = PEERS[config["peer"]]
    count = sum(key.startswith("p0_") for key in old.files)
    steps = sum(key.startswith("g") for key in old.files) // count
    options = {k: v for k, v in config.items() if k not in ("peer", "version", "dtype")}
    values, state = record_peer(
        options,
        [old[f"p0_{i}"] for i in range(count)],
        [[old[f"g{t}_{i}"] for i in range(count)] for t in range(steps)],
    )
    config["version"] = importlib.import_module(module).__version__
    new: dict[str, Any] = {"config": np.array(json.dumps(config))}
    new |= {key: old[key] for key in old.files if key.startswith(("p0_", "g"))}
    for t, arrays in enumerate(values, start=1):
        new |= {f"p{t}_{i}": a for i, a in enumerate(arrays)}
    for key, arrays in state.items():
        new |= {f"state_{key}_{i}": a for i, a in enumerate(arrays)}
    return new


def compare(stored: Path, new: dict[str, Any]) -> str:
    """Say how far a new recording is from the stored one."""
    old = np.load(stored)
    if set(old.files) != set(new):
        return f"other keys: {sorted(set(old.files) ^ set(new))}"
    worst, where = 0.0, ""
    for key in old.files:
        if key == "config" or np.array_equal(old[key], new[key], equal_nan=True):
            continue
        scale = np.spacing(np.nanmax(np.abs(old[key])))
        ulps = float(np.nanmax(np.abs(old[key] - new[key])) / scale)
        worst, where = max((worst, where), (ulps, key))
    return f"within {worst:.3g} ulp of the array ({where})" if where else "identical"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=sorted(PEERS), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--compare", action="store_true", help="with the stored files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for stored in sorted(STORED.glob(f"{args.peer}_*.npz")):
        new = record(stored)
        # Before writing, which may be over the stored file.
        verdict = compare(stored, new) if args.compare else "recorded"
        np.savez(args.out / stored.name, **new)
        print(stored.stem, verdict)


if __name__ == "__main__":
    main()
