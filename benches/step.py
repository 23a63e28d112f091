"""`python -m rmsprop bench --full`: all cases and rivals, for many minutes.

    python benches/step.py [--cases mlp64,1m] [--threads 1,2] [--front torch] [--compile none]

What is measured and how: `python/rmsprop/bench/__init__.py`.
"""

import shlex
import sys

from rmsprop.__main__ import main

if __name__ == "__main__":
    given = sys.argv[1:]
    command = shlex.join(["python", "benches/step.py", *given])
    sys.exit(main(["bench", "--full", *given], command))
