"""What each method costs on `language`: the time of a step, memory, and the size of the file.

    PYTHONPATH=benchmarks python -m learning.costs        # or: make bench-costs

Writes docs/costs.json, and prints the table. Each method has a process of its own, forked from one that
has read the model. It takes turns with a process of LoRA: each does one step of `training.fit`, and then waits. All is
in float32. PEFT's HRA needs 8 GB of memory.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import peft
import torch
from peak import Peak
from safetensors.torch import save_file
from speed.environment import versions
from torch import Tensor, nn
from turns import ratio

import hra_fx
from learning.keeping import ALL
from learning.methods import layer_shapes
from learning.records import FILE as RECORDS
from learning.table import label, number, table
from learning.tasks import TASKS
from learning.tasks.task import Batch
from learning.training import count, fit

FILE = RECORDS.with_name("costs.json")
TASK, ROUNDS, RATE = "language", 3, 1e-3
METHODS = (
    *("lora", "dora", "oft", "boft", "psoft", "road", "miss"),
    *("hra-peft", "hra-pairs", "hra-pairs-protect", "full"),
)


@dataclass(frozen=True)
class Cost:
    """What one method costs.

    Args:
        trainable: trained parameters.
        file_mb: the size of the saved adapter, or of the whole model where all of it is trained.
        peak_mb: how far inserting and training raise the memory of the process.
        seconds: CPU time of each step on one thread.
        lora: the same of LoRA, in the same rounds.
    """

    trainable: int
    file_mb: float
    peak_mb: float | None
    seconds: list[float]
    lora: list[float]


def measure(task: str = TASK, methods: Sequence[str] = METHODS, rounds: int = ROUNDS) -> dict[str, Cost]:
    """The costs by method, from rounds after an uncounted one."""
    model, found = TASKS[task](0).model(), {}
    lora, pipe, _ = started(task, "lora", model)
    for name in methods:
        process, own, size = started(task, name, model)
        steps = [(step(pipe), step(own)) for _ in range(rounds + 1)]
        process.kill()  # of all methods, only LoRA and one other hold their memory
        seconds, others = ([round(each[place][0], 3) for each in steps[1:]] for place in (1, 0))
        found[name] = Cost(*size, steps[-1][1][1], seconds, others)
        print(name, found[name], flush=True)
    lora.kill()
    return found


def started(task: str, name: str, model: nn.Module) -> tuple[ForkProcess, Connection, tuple[int, float]]:
    """A process that is ready for its first step, the pipe to it, and its trained parameters and its file's size."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=train, args=(task, name, model, theirs), daemon=True)
    process.start()
    theirs.close()  # if the process ends, `recv` raises EOFError
    size = ours.recv()
    ours.recv()  # what it sends before its first step
    return process, ours, size


def step(pipe: Connection) -> tuple[float, float | None]:
    """Let a process do a step; return its CPU time and the peak memory until then."""
    pipe.send(None)
    done: tuple[float, float | None] = pipe.recv()
    return done


def train(task_name: str, name: str, model: nn.Module, pipe: Connection) -> None:
    """Train, and before each step send the CPU time of the one before and the peak memory, and wait for an answer."""
    torch.set_num_threads(1)
    task, method = TASKS[task_name](0), ALL[name]
    loss, peak, begin = task.loss, Peak(), time.process_time()

    def paced(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal begin
        pipe.send((time.process_time() - begin, peak.megabytes()))
        pipe.recv()
        begin = time.process_time()
        return loss(model, batch)

    torch.manual_seed(0)
    method.insert(model, task, method.rank(layer_shapes(model, task.targets), task.lora_rank))
    pipe.send((count(model), file_size(model, name)))
    task.loss = paced  # type: ignore[method-assign]
    fit(model, nn.Module(), task, method, RATE)


def file_size(model: nn.Module, name: str) -> float:
    """The size in MB of what hra_fx or PEFT saves."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "adapter_model.safetensors")
        if name.startswith("hra-pairs"):
            hra_fx.save_adapter(model, folder)
        elif name == "full":
            save_file(dict(model.named_parameters()), file)
        else:
            save_file(peft.get_peft_model_state_dict(model, save_embedding_layers=False), file)
        return round(file.stat().st_size / 1e6, 2)


def read(file: Path = FILE) -> tuple[str, dict[str, Cost]]:
    """Where they were measured, and the costs by method."""
    stored = json.loads(file.read_text())
    return stored["environment"], {name: Cost(**entry) for name, entry in stored["costs"].items()}


def costs_table() -> str:
    """A row for each method, and where the costs were measured."""
    about, costs = read()
    rows = [
        [
            label(name),
            f"{cost.trainable:,}",
            f"{ratio(cost.seconds, cost.lora):.2f}",
            f"{cost.peak_mb or 0:,.0f} MB",
            f"{number(cost.file_mb)} MB",
        ]
        for name, cost in costs.items()
    ]
    return f"{table(['', 'parameters', 'time over LoRA', 'memory', 'file'], rows)}\nCosts: {about}\n"


def main() -> None:
    """Measure, write the file, and print the table."""
    about, costs = versions(), measure()
    lines = [f'    "{name}": {json.dumps(dataclasses.asdict(cost))}' for name, cost in costs.items()]
    entries = ",\n".join(lines)
    FILE.write_text(f'{{\n  "environment": {json.dumps(about)},\n  "costs": {{\n{entries}\n  }}\n}}\n')
    print(costs_table())


if __name__ == "__main__":
    main()
