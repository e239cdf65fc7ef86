"""Runs folds in processes that are killed at random moments, then runs each again to the end. Run by the tests.

    python killed.py BASE ADAPTER FOLDER

One process imports the library, and others are forked from it, so that the moments fall into the fold itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import hra_fx

RUNS = 20


def child(base: str, adapter: str, out: str) -> int:
    """The process that folds."""
    number = os.fork()
    if number == 0:
        hra_fx.fold_checkpoint(base, adapter, out, columns=[])
        os._exit(0)
    return number


def seconds(base: str, adapter: str, out: Path) -> float:
    begin = time.perf_counter()
    os.waitpid(child(base, adapter, str(out)), 0)
    return time.perf_counter() - begin


def main() -> None:
    torch.set_num_threads(1)
    base, adapter, folder = sys.argv[1:]
    random.seed(0)
    fold = hra_fx.fold_checkpoint
    fold(base, adapter, Path(folder, "warm", "out"), columns=[])
    whole = max(seconds(base, adapter, Path(folder, f"warm {i}", "out")) for i in range(2))
    killed = resumed = 0
    for i in range(RUNS):
        out = Path(folder, str(i), "out")
        out.parent.mkdir(parents=True)
        # A third of them is killed twice, on the way and again while it goes on.
        for _ in range(1 + (i % 3 == 0)):
            number = child(base, adapter, str(out))
            time.sleep(random.random() * whole)
            os.kill(number, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(number, 0)[1])
        resumed += fold(base, adapter, out, columns=[], overwrite=True).reused > 0
    print(json.dumps({"runs": RUNS, "killed": killed, "resumed": resumed}))


if __name__ == "__main__":
    main()
