"""Times one step of rmsprop beside the rivals that are installed, in one run.

Every contender has its own parameters and state, shares the gradients, and takes its turn
in every round, so that a slow spell of the machine hits all of them. A sample is as many
steps as fill some milliseconds, after one that is not counted. Reported are the median and
the minimum over the rounds, and both divided by ours with the same number of threads.

``limit`` reads p, g, v and writes p, v with one multiply-add each: the five streams that
any f32 update of this kind must move; where gradients are clipped it reads g once more
before. Divided by ours it says how close to it ours comes. Without numba it is an
approximation in NumPy. The exact one is in ``cargo bench``.

An asterisk marks another rule than RMSprop's: Adagrad moves five streams as well, Adam
seven, SGD three.

Only NumPy is needed. numba and torch are rivals if they are there, rich makes the table
and the progress bar prettier, matplotlib draws. ``python -m rmsprop bench`` and
``benches/step.py`` are its two doors; ``benches/tensors.py`` and ``benches/threads.py``
take the same contenders through a range of sizes.
"""
