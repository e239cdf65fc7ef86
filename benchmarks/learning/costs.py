"""What each method costs on `language`: the time of a step, memory, and the size of the file.

    PYTHONPATH=benchmarks python -m learning.costs        # or: make bench-costs

Writes docs/costs.json, and prints the table. Each method has a process of its own, in which its steps take turns with
LoRA's. All is in float32. PEFT's HRA needs 11 GB of memory.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peak import Peak
from safetensors.torch import save_file
from speed.environment import versions
from torch import nn
from turns import in_turns, ratio

import hra_fx
from learning.keeping import ALL
from learning.methods import Method, layer_shapes
from learning.records import FILE as RECORDS
from learning.table import label, number, table
from learning.tasks import TASKS
from learning.tasks.task import Task
from learning.training import count

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
    TASKS[task](0).model()  # what tasks cache is read once
    found = {}
    for name in methods:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found[name] = pool.apply(cost, (task, name, rounds))
        print(name, found[name], flush=True)
    return found


def cost(task_name: str, name: str, rounds: int) -> Cost:
    """The cost of one method, in a process of its own."""
    torch.set_num_threads(1)
    task = TASKS[task_name](0)
    model, peak = task.model(), Peak()
    own = step_of(model, task, ALL[name])
    own()
    own()  # with the optimizer's state
    peak_mb = peak.megabytes()
    times = in_turns({"lora": step_of(task.model(), task, ALL["lora"]), "own": own}, rounds, time.process_time)
    seconds, lora = ([round(value, 3) for value in times[one]] for one in ("own", "lora"))
    return Cost(count(model), file_size(model, name), peak_mb, seconds, lora)


def step_of(model: nn.Module, task: Task, method: Method) -> Callable[[], None]:
    """Insert an adapter, and return a training step."""
    torch.manual_seed(0)
    method.insert(model, task, method.rank(layer_shapes(model, task.targets), task.lora_rank))
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    method.prepare_optimizer(optimizer, model, task)
    batch = task.batches()[0]

    def step() -> None:
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


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
