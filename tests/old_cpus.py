"""Steps on processors of other years, under qemu: the same bits, no instruction that they lack.

    make old-cpus

Needs qemu-x86_64, of Debian's package qemu-user. (It knows no AVX-512.)
"""

import hashlib
import shutil
import subprocess
import sys

import numpy as np
import rmsprop

# What a step uses there: NumPy's own wheels need the instructions of 2009.
CPUS = {
    "Nehalem": "sse2",
    "SandyBridge": "sse2",
    "Haswell": "avx2",
    "EPYC": "avx2",
    "Skylake-Client": "avx2",
}


def trained() -> str:
    """The instruction set, and a digest of parameters after some steps of four dialects."""
    rng, digest = np.random.default_rng(0), hashlib.sha256()
    for dtype in (np.float32, np.float64):
        for name in ("torch", "tf1", "graves", "dqn"):
            shapes = [(7, 5), (1000,), (), (3, 4, 5)]
            params = [np.array(rng.normal(size=shape), dtype) for shape in shapes]
            opt = rmsprop.RMSprop(params, max_grad_norm=10.0, **rmsprop.dialect(name))
            for _ in range(5):
                opt.step(grads=[rng.normal(size=p.shape) for p in params])
            digest.update(b"".join(p.tobytes() for p in params))
    return f"{rmsprop.info()['isa']} {digest.hexdigest()[:16]}"


def main() -> None:
    if sys.argv[1:] == ["here"]:
        print(trained())
        return
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        sys.exit("old_cpus: expected qemu-x86_64, got none: apt install qemu-user")
    isa, wanted = trained().split()
    print(f"{'this one':16} {isa:8} {wanted}")
    for cpu, isa in CPUS.items():
        command = [qemu, "-cpu", cpu, sys.executable, __file__, "here"]
        finished = subprocess.run(command, check=False, capture_output=True, text=True)
        if finished.returncode:
            sys.exit(f"{cpu}: {finished.stderr}")
        found = finished.stdout.split()
        print(f"{cpu:16} {found[0]:8} {found[1]}")
        if found != [isa, wanted]:
            sys.exit(f"{cpu}: expected {isa} {wanted}, got {' '.join(found)}")


if __name__ == "__main__":
    main()
