"""``python -m rmsprop``: what runs here and what limits it, and how fast it is."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rmsprop import __version__, info, machine


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, or those of the process; gives the exit status."""
    parser = argparse.ArgumentParser("python -m rmsprop", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command")
    about = "version, instruction set, threads, features, and what limits them"
    asked = commands.add_parser("info", help=about, description=about)
    asked.add_argument("--json", action="store_true", help="as JSON")
    asked.add_argument(
        "--torch", action="store_true", help="import torch, for its threads"
    )
    about = "a step and a training loop beside NumPy, numba and torch, if installed"
    timed = commands.add_parser("bench", help=about, description=about)
    timed.add_argument("--threads", type=int, default=1, help="of ours and of torch")
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command == "info":
        return _print_info(as_json=args.json, import_torch=args.torch)
    if args.threads < 1:
        timed.error(f"--threads: expected 1 or more, got {args.threads}")
    from rmsprop import bench  # `info` must not wait for what it does not use

    try:
        return bench.run(args.threads)
    except KeyboardInterrupt:
        print("\npython -m rmsprop bench: interrupted", file=sys.stderr)
        return 130


def describe(*, import_torch: bool = False) -> dict[str, Any]:
    """What :func:`rmsprop.info` says, what limits it, and what it runs on.

    Args:
        import_torch: imports torch to ask for its threads. Otherwise they are known only
            if something else has imported it.

    Raises:
        ValueError: ``RMSPROP_NUM_THREADS`` is not a number >= 1.
        ImportError: torch was asked for and is not there.
    """
    if import_torch:
        import torch  # noqa: F401
    torch_module = sys.modules.get("torch")
    found = machine.describe()
    names = ("RMSPROP_ISA", "RMSPROP_NUM_THREADS")
    return {
        **info(),
        "isa_limit": "RMSPROP_ISA" if os.environ.get(names[0]) else "the processor",
        "threads_limit": machine.thread_limit(found),
        "environment": {name: os.environ.get(name) for name in names},
        "machine": found,
        "versions": machine.versions("numpy", "torch", "numba", "threadpoolctl"),
        "torch_threads": torch_module.get_num_threads() if torch_module else None,
    }


def _print_info(*, as_json: bool, import_torch: bool) -> int:
    try:
        found = describe(import_torch=import_torch)
    except (ImportError, ValueError) as error:
        print(f"python -m rmsprop info: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))
    return 0


def _lines(found: dict[str, Any]) -> list[str]:
    box: dict[str, Any] = found["machine"]
    versions: dict[str, str] = dict(found["versions"])
    quota, usable = box["quota"], box["usable_cores"]
    lines = [
        ("rmsprop", versions.pop("rmsprop")),
        ("features", ", ".join(found["features"])),
        ("instruction set", f"{found['isa']}, set by {found['isa_limit']}"),
        ("threads", f"{found['threads']}, set by {found['threads_limit']}"),
        ("processor", f"{box['processor']} ({box['architecture']}, {box['system']})"),
        ("cores", f"{box['cores']}"),
        ("affinity", f"{usable} cores" if usable else "unknown"),
        ("cgroup quota", f"{quota:g} cores" if quota else "none"),
    ]
    for name, value in found["environment"].items():
        lines.append((name, value or "not set"))
    names = {"python": "Python", "numpy": "NumPy"}
    lines += [(names.get(name, name), version) for name, version in versions.items()]
    if "torch" in versions:
        threads = found["torch_threads"]
        said = f"{threads}" if threads else "not asked (--torch imports it)"
        lines.append(("threads of torch", f"{said}; used by rmsprop.torch"))
    width = max(len(name) for name, _ in lines)
    return [f"{name:{width}}  {value}" for name, value in lines]


if __name__ == "__main__":
    sys.exit(main())
