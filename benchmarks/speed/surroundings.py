"""What a run was measured on: versions, processor, threads, date, commit, and how busy the machine was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "diffusers", "torchvision")
OF_THE_PROCESSOR = "of the processor"


def surroundings(run: str, *, whole: bool = True, by_processor: bool = False) -> dict[str, Any]:
    """Of a run that begins now."""
    import torch

    about: dict[str, Any] = {
        "run": run,
        "measured": "all of it" if whole else "a part",
        "seconds": OF_THE_PROCESSOR if by_processor else "by the clock",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load average at start": busy(),
    }
    if torch.cuda.is_available():
        about["card"] = torch.cuda.get_device_name()
    return about


def busy() -> float:
    """How many processes wanted to run in the last minute."""
    return round(os.getloadavg()[0], 2)


def doubts(about: dict[str, Any]) -> list[str]:
    """Why the numbers of a run are to be taken with care."""
    found = list[str]()
    load, cores = about.get("load average at start", 0), about.get("cores", 1)
    if load > cores / 2:
        busy = f"The machine was busy (load average {load} at the start, {cores} cores)"
        by_processor = about.get("seconds") == OF_THE_PROCESSOR
        found.append(f"{busy}{'; seconds are of the processor' if by_processor else ': no ratio is sure'}.")
    if about.get("measured") == "a part":
        found.append("This was a part of the run, or a shortened one.")
    return found


def processor() -> str:
    """Its name, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Of the checkout, and whether the code that is measured differs from it."""

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/hra_fx", ":/passes", ":/benchmarks/speed")
        return git("rev-parse", "--short", "HEAD") + (", with changes that are not committed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
