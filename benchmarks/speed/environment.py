"""The environment of a run: versions, processor, threads, date, commit, and load of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "diffusers", "torchvision")
CPU_TIME = "CPU time"


def environment(run: str, *, whole: bool = True, by_processor: bool = False) -> dict[str, Any]:
    """Describe the environment at the start of a run."""
    import torch

    about: dict[str, Any] = {
        "run": run,
        "measured": "everything" if whole else "a part",
        "seconds": CPU_TIME if by_processor else "wall time",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load average at start": busy(),
    }
    if torch.cuda.is_available():
        about["card"] = torch.cuda.get_device_name()
    return about


def versions() -> str:
    """The releases, the commit and the processor in one line."""
    releases = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return f"{releases}; commit {commit()}; {processor()}."


def version(package: str) -> str:
    """The version of a package, which may be missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def busy() -> float:
    """The load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def caveats(about: dict[str, Any]) -> list[str]:
    """Reasons to be careful with the results of a run."""
    found = list[str]()
    load, cores = about.get("load average at start", 0), about.get("cores", 1)
    if load > cores / 2:
        busy = f"The machine was busy (load average {load} at the start, {cores} cores)"
        by_processor = about.get("seconds") == CPU_TIME
        found.append(f"{busy}{'; times are CPU times' if by_processor else ': the ratios are unsure'}.")
    if about.get("measured") == "a part":
        found.append("Only a part of the settings was measured.")
    return found


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@cache
def commit() -> str:
    """The short commit of this code, with a `+` if files have changed since."""
    git = partial(subprocess.run, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    try:
        short = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "-uno", "hra_fx", "passes", "benchmarks", "examples"]).stdout
        return short + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
