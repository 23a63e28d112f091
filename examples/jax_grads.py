"""Parameters in NumPy, gradients from JAX, the update by rmsprop.

    python examples/jax_grads.py

Fits scikit-learn's diabetes data with a small network. `jax.value_and_grad` under `jit`
computes on the CPU; `opt.step(grads=...)` reads JAX's arrays where they lie (DLPack, no
copy) and writes the NumPy parameters in place. Needs jax and scikit-learn.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import jax
import jax.numpy as jnp
import numpy as np
from rmsprop import RMSprop
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

Arrays = dict[str, np.ndarray]


def predict(params: Arrays, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["hidden.weight"] + params["hidden.bias"])
    return hidden @ params["out.weight"] + params["out.bias"]


def mean_square(params: Arrays, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((predict(params, x) - y) ** 2)


def init(rng: np.random.Generator, features: int, hidden: int) -> Arrays:
    """Plain NumPy arrays, writable: the optimizer updates them where they are."""
    weight = rng.normal(0, features**-0.5, (features, hidden))
    out = rng.normal(0, hidden**-0.5, hidden)
    return {
        "hidden.weight": weight.astype(np.float32),
        "hidden.bias": np.zeros(hidden, dtype=np.float32),
        "out.weight": out.astype(np.float32),
        "out.bias": np.zeros((), dtype=np.float32),
    }


def main() -> None:
    x, y = load_diabetes(return_X_y=True)
    y = StandardScaler().fit_transform(np.reshape(y, (-1, 1)))[:, 0]
    x = StandardScaler().fit_transform(x)
    data = (x.astype(np.float32), y.astype(np.float32))
    x_train, x_test, y_train, y_test = train_test_split(
        *data, test_size=1 / 4, random_state=0
    )
    # Nobody writes to the data, so JAX may keep it.
    x_train, y_train = jnp.array(x_train), jnp.array(y_train)

    params = init(np.random.default_rng(0), features=10, hidden=32)
    opt = RMSprop(params, lr=3e-4, weight_decay=0.1)
    loss_and_grads = jax.jit(jax.value_and_grad(mean_square))
    test_loss = jax.jit(mean_square)

    for step in range(301):
        # A CPU computation may read NumPy arguments where they lie instead of copying
        # them, and it runs after the call has returned: writing to the parameters before
        # it is done changes what it computes. So wait for every result before step(),
        # and hand the parameters over anew each time. A JAX array made from them once
        # (device_put, even with may_alias=False; JAX 0.10) can be a view that changes
        # behind JAX's back; `jnp.array(p)` makes a real copy if you need to keep one.
        loss, grads = jax.block_until_ready(loss_and_grads(params, x_train, y_train))
        if step % 50 == 0:
            held_out = float(test_loss(params, x_test, y_test))  # float() waits, too
            print(f"step {step:3}: loss {float(loss):.4f}, held out {held_out:.4f}")
        # A mapping with the parameters' names. JAX arrays are immutable: good for
        # gradients, which are only read; as parameters they would be refused.
        opt.step(grads=grads)


if __name__ == "__main__":
    main()
