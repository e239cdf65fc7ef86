"""Run checks one after another in two gloo processes, and report which failed.

Starting processes takes as long as all checks together. They meet at a file instead of a port, which may be in use.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import distributed
from torch.multiprocessing.spawn import ProcessException, start_processes

WORLD = 2
#: What takes seconds to import. One process does so once, and each that runs checks is a fork of it.
IMPORTS = ["torch", "transformers", "peft", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
#: What every process runs: its rank, and a folder that all of them see.
Check: TypeAlias = Callable[[int, Path], None]


def run(checks: Mapping[str, Check], folder: Path) -> dict[str, str]:
    """Name of a check -> what went wrong in any process; empty where nothing did."""
    multiprocessing.set_forkserver_preload(IMPORTS)
    try:
        start_processes(_worker, (dict(checks), str(folder)), WORLD, start_method="forkserver")
        end = "was not run"
    except ProcessException as error:  # a check that failed in one of them alone may keep the other waiting
        end = f"was not run, for a process broke off: {error}"
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]
    return {name: "\n".join(filter(None, (one.get(name, end) for one in told))) for name in checks}


def _worker(rank: int, checks: dict[str, Check], folder: str) -> None:
    torch.set_num_threads(1)
    # What a launcher sets, for accelerate; the group that it finds is the one below.
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "unused"})
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate warns, and sets it
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    told: dict[str, str] = {}
    for number, (name, check) in enumerate(checks.items()):
        place = Path(folder, str(number))
        place.mkdir(exist_ok=True)
        told[name] = _failure(check, rank, place)
        Path(folder, f"{rank}.json").write_text(json.dumps(told))
        distributed.barrier()
    distributed.destroy_process_group()


def _failure(check: Check, rank: int, place: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # torch raises it when inductor is imported.
            warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
            # torch raises it for a sharded Linear with a bias and 3-D inputs, and for a sharded attention.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            warnings.filterwarnings("ignore", "adapter .*, so it does not start as the base model")
            check(rank, place)
    except BaseException:
        return f"process {rank}:\n{traceback.format_exc()}"
    return ""
