"""The command `python -m rmsprop bench`, which is `benches/step.py` too."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from itertools import product
from pathlib import Path

from rmsprop import info
from rmsprop.bench import report
from rmsprop.bench.cases import CASES, QUICK, Plan, Section, bench, check, fronts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be asked for."""
    add = parser.add_argument
    add("--cases", metavar="A,B", help=f"some of {', '.join(CASES)}")
    add("--threads", metavar="N,M", help="1 and all that there are, if left out")
    add("--front", metavar="A,B", help="arrays, torch; both, if left out")
    add("--full", action="store_true", help="all cases and rivals, for many minutes")
    add("--compile", metavar="A,B", help="cases with torch.compile, or none")
    add("--seconds", type=float, metavar="S", help="to go on sampling in each table")
    add("--json", metavar="FILE", help="write the results there; - for stdout")
    add("--plot", type=Path, metavar="FILE", help="draw them: .png, .svg or .pdf")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace, command: str) -> int:
    """Measures as the arguments say. Bad arguments end the program, as in argparse."""
    left_out: dict[str, str] = {}
    there = choose_fronts(parser, args.front, left_out)
    threads = _threads(parser, args.threads)
    cases = list(CASES) if args.full else list(QUICK)
    if args.cases:
        cases = _chosen(parser, "--cases", args.cases, CASES)
    compiled: list[str] = []
    if args.compile:
        compiled = _chosen(parser, "--compile", args.compile, [*CASES, "none"])
    elif args.full:
        compiled = [name for name in CASES if CASES[name].compiled]
    check_files(parser, args)

    sample_s, seconds = (5e-3, 5.0) if args.full else (2e-3, 1.0)
    seconds = seconds if args.seconds is None else args.seconds
    plan = Plan(sample_s, seconds, frozenset(compiled), args.full, left_out)
    if "torch" in there:
        try:
            import rmsprop.torch  # noqa: F401
        except ImportError as error:
            there.remove("torch")
            left_out["torch"] = str(error)
        without = [name for name in cases if name not in compiled]
        if "torch" in there and without:
            left_out["torch.compile"] = (
                f"takes long (--compile {','.join(without)}, or --full)"
                if not args.full
                else f"takes long in {', '.join(without)} (--compile)"
            )

    out = sys.stderr if args.json == "-" else sys.stdout
    about = report.context(command)
    print(report.headline(about), report.LEGEND, sep="\n\n", file=out, flush=True)
    sections: list[Section] = []
    todo = list(product(cases, there, threads))
    with report.terminal(len(todo), out) as (say, show):
        for front in there:
            say(f"checking that all on {front} compute the same")
            check(front, "mlp64", threads, plan)
        for name, front, count in todo:
            say(report.title(Section(front, name, count, [])))
            section = bench(front, name, count, plan)
            show(section)
            if section.rows:
                sections.append(section)
    if left_out:
        print("\nleft out:", file=out)
        for what, why in left_out.items():
            print(f"  {what}: {why}", file=out)
    if args.json:
        text = json.dumps(report.document(about, sections, left_out), indent=2)
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(f"{text}\n")
    if args.plot and sections:
        report.plot(about, sections, args.plot)
    return 0


def choose_fronts(
    parser: argparse.ArgumentParser, given: str | None, left_out: dict[str, str]
) -> list[str]:
    """Those that are asked for, or all that are installed; `left_out` gets the others."""
    there = fronts(left_out)
    if not given:
        return there
    wanted = _chosen(parser, "--front", given, ("arrays", "torch"))
    if missing := [front for front in wanted if front not in there]:
        parser.error(f"--front: {missing[0]} is {left_out[missing[0]]}")
    return wanted


def check_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Before anything is measured: whether what is asked for could be written."""
    try:
        if args.plot:
            report.check_plot(args.plot)
        if args.json and args.json != "-":
            report.check_folder("--json", Path(args.json))
    except (ImportError, ValueError) as error:
        parser.error(str(error))


def _threads(parser: argparse.ArgumentParser, given: str | None) -> list[int]:
    if not given:
        return sorted({1, info()["threads"]})
    try:
        threads = [int(count) for count in given.split(",")]
    except ValueError:
        threads = [0]
    if min(threads) < 1:
        parser.error(f"--threads: expected numbers >= 1, got {given!r}")
    return threads


def _chosen(
    parser: argparse.ArgumentParser, option: str, given: str, names: Collection[str]
) -> list[str]:
    """The names in a comma-separated list."""
    found = given.split(",")
    if unknown := [name for name in found if name not in names]:
        parser.error(
            f"{option}: expected some of {', '.join(names)}, got {unknown[0]!r}"
        )
    return found
