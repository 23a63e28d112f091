"""Times steps of rmsprop beside those of rivals; the programs in `benches/` are its doors.

Every contender has its own parameters and state, shares the gradients, and takes its turn
in every round, so that a slow spell of the machine hits all of them. A sample is as many
steps as fill some milliseconds, after some that are not counted.

``limit`` reads p, g, v and writes p, v with one multiply-add each: the five streams that
any f32 update of this kind must move; where gradients are clipped it reads g once more
before. Divided by ours it says how close to it ours comes. It needs numba; ``cargo bench``
has the exact one.

An asterisk marks another rule than RMSprop's: Adagrad moves five streams as well, Adam
seven, SGD three.

Only NumPy is needed. numba and torch are rivals if they are there.
"""

from importlib.util import find_spec


def is_installed(package: str) -> bool:
    """Whether it can be imported, found out without importing it."""
    return find_spec(package) is not None
