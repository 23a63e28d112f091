"""Finding out whether arrays overlap takes no memory that grows with them.

Measured in interpreters of their own, as the most that was resident: what `getrusage` says would include the memory
of the process that started them.
"""

import pytest

PEAK = """
import numpy as np
from numpy.lib.stride_tricks import as_strided
from rmsprop import Parameter, RMSprop

NUMEL = 5_000_000

def peak():
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

memory = np.ones(2 * NUMEL, np.float32)
grad = np.broadcast_to(np.float32(0), (NUMEL,))
{lines}
"""

MEASURED = {
    "constructor": """
before = peak()
opt = RMSprop([memory[::2], memory[1::2]])
print(peak() - before)
""",
    "step after a move": """
third = Parameter(np.ones(4, np.float32))
opt = RMSprop([memory[::2], memory[1::2], third])
grads = [grad, grad, np.ones(4, np.float32)]
opt.step(grads=grads)
before = peak()
for _ in range(2):
    third.data = third.data.copy()
    opt.step(grads=grads)
print(peak() - before)
""",
    "two rows in each other": """
rows = as_strided(memory, (NUMEL - 2, 2), (8, 12))
before = peak()
opt = RMSprop([rows])
print(peak() - before)
""",
    "many rows in each other": """
rows = as_strided(memory, (2000, 3, 1500), (12 * 1500, 4 * 1501, 12))
before = peak()
opt = RMSprop([rows])
print(peak() - before)
""",
    "gradient between the elements": """
opt = RMSprop([memory[::2]])
opt.step(grads=[grad])
before = peak()
opt.step(grads=[memory[1::2]])
opt.step(grads=[memory[::-2]])
print(peak() - before)
""",
}


@pytest.mark.parametrize("lines", MEASURED.values(), ids=MEASURED)
def test_interleaved_arrays(lines, run_python):
    assert int(run_python(PEAK.format(lines=lines))) < 8_000_000
