"""What a process runs on, and what limits its threads: for reports, not for steps."""

from __future__ import annotations

import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rmsprop import _core

_CGROUPS = Path("/sys/fs/cgroup")


def describe() -> dict[str, Any]:
    """The machine as JSON takes it; None where the system does not say.

    ``cores`` counts what the system calls a processor, ``usable_cores`` those that the
    affinity of this process leaves, ``quota`` how many its cgroups pay for.
    """
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "quota": _quota(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python, rmsprop, and those of the packages that are installed."""
    found = {"python": platform.python_version(), "rmsprop": _core.__version__}
    return found | {name: _version(name) for name in packages if is_installed(name)}


def is_installed(package: str) -> bool:
    """Whether it can be imported, found out without importing it."""
    return find_spec(package) is not None


def thread_limit(machine: dict[str, Any]) -> str:
    """Why ``threads=None`` means as many threads as it does, on the described machine."""
    if os.environ.get("RMSPROP_NUM_THREADS"):
        return "RMSPROP_NUM_THREADS"
    cores, usable, quota = (machine[k] for k in ("cores", "usable_cores", "quota"))
    if quota is not None and quota < (usable or cores or math.inf):
        return "the quota of the cgroup"
    if usable is not None and usable != cores:
        return "the affinity of the process"
    return "the cores of the machine"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else None


def _quota() -> float | None:
    """The least quota of this process's cgroups and of those that they are in."""
    found: list[float] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, read = _CGROUPS, _quota_v2
        elif "cpu" in controllers.split(","):
            root, read = _CGROUPS / "cpu", _quota_v1
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                quota, period = read(folder)
            except (OSError, ValueError):  # not there, or "max"
                continue
            if quota > 0:
                found.append(quota / period)
    return min(found, default=None)


def _quota_v2(folder: Path) -> tuple[int, int]:
    quota, period = (folder / "cpu.max").read_text().split()
    return int(quota), int(period)


def _quota_v1(folder: Path) -> tuple[int, int]:
    quota, period = (
        int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
    )
    return quota, period
