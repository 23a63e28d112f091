"""Times a step of one commit beside that of another, in turns, and prints the ratio.

    python benches/compare.py BASE [HEAD] [--cases mlp64,1m] [--front arrays] [--threads 1]

Without HEAD it is the working tree: the tracked files as they are, committed or not. Both
are built in git worktrees under build/, which are removed again. A round is a process for
each commit, BASE first in one round and HEAD first in the next, so that neither a slow
spell of the machine nor where memory happens to lie falls on one of them alone. Each takes
the median of its samples of every case; printed are the medians over the rounds, and the
median, the quartiles and the extremes of the rounds' ratios. A ratio above 1 is a loss.

Both are measured by this tree's `benches/harness`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["mlp64", "mlp256", "many", "1m", "10m"]
SAMPLE_S = 2e-3
Key = tuple[str, str, int]  # case, front, threads


def output(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Runs a command; its errors end this program, after what it wrote."""
    finished = subprocess.run(
        command,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{finished.stdout}{finished.stderr}")
    return finished.stdout.strip()


def resolve(commit: str | None) -> str:
    """The commit of that name; None for one of the tracked files as they are."""
    if commit is None:  # prints nothing if they are those of HEAD
        commit = output("git", "stash", "create") or "HEAD"
    return output("git", "rev-parse", "--verify", f"{commit}^{{commit}}")


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """A checkout that is gone afterwards."""
    output("git", "worktree", "add", "--detach", "--quiet", folder, commit)
    try:
        yield folder
    finally:
        output("git", "worktree", "remove", "--force", folder)


def build(commit: str, folder: Path) -> Path:
    """Builds a commit's wheel and unpacks it; gives the folder to import it from."""
    print(
        f"building {output('git', 'log', '-1', '--format=%h %s', commit)}", flush=True
    )
    with worktree(commit, folder / "tree") as tree:
        output(
            *(sys.executable, "-m", "maturin", "build", "--release"),
            *("--interpreter", sys.executable, "--out", folder / "dist"),
            cwd=tree,
            CARGO_TARGET_DIR=str(ROOT / "target" / "compare"),
        )
    (wheel,) = (folder / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def measure(site: Path, keys: list[Key], seconds: float) -> list[float]:
    """Median microseconds of a step in each case, from a process of its own."""
    asked = json.dumps([str(site), keys, seconds])
    command = (sys.executable, __file__, "--measure", asked)
    printed = output(*command, PYTHONPATH=str(site))  # before what is installed
    medians: list[float] = json.loads(printed)
    return medians


def measure_here(site: str, keys: list[Key], seconds: float) -> list[float]:
    """What the process of `measure` does."""
    import rmsprop

    found = Path(rmsprop.__file__)
    if not found.is_relative_to(site):
        sys.exit(f"expected rmsprop in {site}, got {found}")
    from harness.cases import CASES, make_arrays, rivals
    from harness.timing import Contender
    from harness.timing import measure as sample

    medians = []
    for name, front, threads in keys:
        ours = rivals(front, CASES[name])["rmsprop"]
        params, grads = make_arrays(front, CASES[name].shapes)
        contender = Contender(ours(params(), grads, threads), threads)
        (samples,) = sample({name: contender}, SAMPLE_S, seconds).values()
        medians.append(statistics.median(samples))
    return medians


def parse() -> tuple[argparse.Namespace, list[Key]]:
    # Not at the top of the file: the process of `measure` has another rmsprop.
    from harness.cases import CASES, FRONTS, rivals
    from harness.report import numbers, some_of

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("base", help="a commit")
    add("head", nargs="?", help="another; or else the working tree")
    add("--cases", type=some_of(list(CASES)), default=QUICK, metavar="A,B")
    add("--front", type=some_of(FRONTS), default=["arrays"], metavar="A,B")
    add("--threads", type=numbers(1), default=[1], metavar="N,M")
    add("--rounds", type=int, default=20)
    add("--seconds", type=float, default=0.2, help="of each case in each round")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: expected 2 or more")
    keys = [
        (case, front, count)
        for case, front, count in product(args.cases, args.front, args.threads)
        if rivals(front, CASES[case])
    ]
    if not keys:
        parser.error("--front: arrays have none of these cases")
    return args, keys


def main() -> None:
    args, keys = parse()
    commits = [resolve(args.base), resolve(args.head)]
    (ROOT / "build").mkdir(exist_ok=True)
    rounds = []
    with tempfile.TemporaryDirectory(prefix="compare-", dir=ROOT / "build") as folder:
        sites = []
        for name, commit in zip(("base", "head"), commits):
            (Path(folder) / name).mkdir()
            sites.append(build(commit, Path(folder) / name))
        for index in range(args.rounds):
            if sys.stderr.isatty():
                print(f"\rround {index + 1}/{args.rounds}", end=" ", file=sys.stderr)
            order = (0, 1) if index % 2 == 0 else (1, 0)
            times = {turn: measure(sites[turn], keys, args.seconds) for turn in order}
            rounds.append((times[0], times[1]))

    line = "{:16}{:8}{:>3}{:>10}{:>10}{:>8}   {}".format
    spread = "quartiles     extremes"
    print(f"\nus a step, {args.rounds} rounds; ratio: HEAD over BASE")
    print(line("case", "front", "thr", "BASE", "HEAD", "ratio", spread))
    for index, (case, front, count) in enumerate(keys):
        base, head = ([times[side][index] for times in rounds] for side in (0, 1))
        ratios = [b / a for a, b in zip(base, head)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        medians = (f"{statistics.median(side):.4g}" for side in (base, head))
        spread = f"{low:.3f}-{high:.3f}  {min(ratios):.3f}-{max(ratios):.3f}"
        print(line(case, front, count, *medians, f"{ratio:.3f}", spread))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure_here(*json.loads(sys.argv[2]))))
    else:
        main()
