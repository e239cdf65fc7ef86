"""One run: insert an adapter, train it, and measure."""

from __future__ import annotations

import math
import time

import torch
import transformers
from torch import nn

from learning.memory import Peak
from learning.methods import Method, layer_shapes
from learning.records import Record
from learning.tasks import TASKS
from learning.tasks.task import Task
from learning.variants import ALL

WARMUP = 0.1


def run(
    task_name: str, method_name: str, seed: int, lr: float, *, r: int | None = None, test: bool, tiny: bool = False
) -> Record:
    """Train once and return the record.

    Args:
        task_name, method_name: names in `TASKS` and `ALL`.
        seed: see `Task`.
        lr: the largest learning rate.
        r: the rank; None for the one with as many parameters as LoRA.
        test: read the test split.
        tiny: see `Task`.
    """
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    task, method = TASKS[task_name](seed, tiny=tiny), ALL[method_name]
    model = task.model()
    if r is None:
        r = method.rank(layer_shapes(model, task.targets), task.lora_rank)
    method.insert(model, task, r)
    head = model.get_submodule(task.head).requires_grad_(True) if task.head else nn.Module()
    trainable = count(model) - count(head)
    peak, start = Peak(), time.process_time()
    fit(model, head, task, method, lr)
    seconds, peak_mb = time.process_time() - start, peak.megabytes()
    return Record(
        task_name,
        method_name,
        r,
        seed,
        lr,
        trainable,
        round(task.validate(model), 4),
        round(task.test(model), 4) if test else None,
        round(seconds, 1),
        peak_mb,
        {name: round(value, 4) for name, value in task.retention(model).items()},
    )


def fit(model: nn.Module, head: nn.Module, task: Task, method: Method, lr: float) -> None:
    """AdamW with a linear schedule, warmup, and gradients clipped to norm 1."""
    in_head = {id(parameter) for parameter in head.parameters()}
    inserted = [value for value in model.parameters() if value.requires_grad and id(value) not in in_head]
    groups = [
        {"params": inserted, "lr": lr, "weight_decay": method.weight_decay},
        {"params": list(head.parameters()), "lr": task.head_lr if inserted else lr, "weight_decay": 0.0},
    ]
    if not any(group["params"] for group in groups):
        return
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    batches = task.batches()
    warmup = math.ceil(WARMUP * len(batches))
    schedule = transformers.get_scheduler(method.schedule, optimizer, warmup, len(batches) + 1)
    for batch in batches:
        loss = task.loss(model, batch)
        if method.penalty is not None:
            loss = loss + method.penalty(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([value for group in groups for value in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        if method.after_step is not None:
            method.after_step(model)


def count(module: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
