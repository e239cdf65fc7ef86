"""One run: insert an adapter, train it, and measure."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import transformers
from peak import Peak
from speed.environment import commit
from torch import nn

from learning.bfloat16 import BaseProducts, is_fast
from learning.keeping import ALL
from learning.methods import Method, layer_shapes
from learning.records import Record, scaled_name
from learning.tasks import TASKS
from learning.tasks.task import Batch, Task

#: The part of the steps in which the learning rate rises.
WARMUP = 0.1


def run(
    task_name: str,
    method_name: str,
    seed: int,
    lr: float,
    r: int | None = None,
    test: bool = True,
    float32: bool = False,
    *,
    tiny: bool = False,
) -> list[Record]:
    """Train once and return the record, and those of the trained model at other scales.

    Args:
        task_name, method_name: names in `TASKS` and `ALL`.
        seed: see `Task`.
        lr: the largest learning rate.
        r: the rank; None for the one with as many parameters as LoRA.
        test: read the test split.
        tiny: see `Task`.
        float32: compute nothing in bfloat16.
    """
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    task, method = TASKS[task_name](seed, tiny=tiny), ALL[method_name]
    model, base = task.model(), task.model()
    if r is None:
        r = method.rank(layer_shapes(model, task.targets), task.lora_rank)
    linears = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    torch.manual_seed(seed)
    method.insert(model, task, r)
    head = model.get_submodule(task.head).requires_grad_(True) if task.head else nn.Module()
    rounded = task.bfloat16 and not float32 and is_fast()
    products = BaseProducts(model, linears) if rounded else nullcontext()
    trainable = count(model) - count(head)
    peak = Peak()
    with products:
        curve, seconds = fit(model, head, task, method, lr)
        peak_mb = peak.megabytes()

    def measured(name: str, curve: list[list[float]]) -> Record:
        with products:
            validation, tested = task.validate(model), task.test(model) if test else None
            retention = task.retention(model)
        return Record(
            task_name,
            name,
            r,
            seed,
            lr,
            trainable,
            round(validation, 4),
            None if tested is None else round(tested, 4),
            round(seconds, 1),
            peak_mb,
            {name: round(value, 4) for name, value in retention.items()},
            curve,
            commit(),
            "bfloat16" if rounded else "float32",
            round(moved(model, base, task.targets), 5),
        )

    records, before = [measured(method_name, curve)], 1.0
    for scale in task.scales if test and method.rescale else ():
        method.rescale(model, base, scale, before)
        records.append(measured(scaled_name(method_name, scale), []))
        before = scale
    return records


@torch.no_grad()
def moved(model: nn.Module, base: nn.Module, targets: Sequence[str]) -> float:
    """How far the weights of Linears are from those of the base model: the mean of `||W' - W|| / ||W||`."""
    found = []
    for path, layer in base.named_modules():
        if isinstance(layer, nn.Linear) and path.endswith(tuple(targets)):
            # The layers of all libraries can be called. A quantized weight has no values of its own.
            rows = torch.eye(layer.in_features)
            change, weight = model.get_submodule(path)(rows) - layer(rows), layer(rows) - layer(torch.zeros_like(rows))
            found.append(float(change.norm() / weight.norm()))
    return statistics.fmean(found) if found else 0.0


def fit(model: nn.Module, head: nn.Module, task: Task, method: Method, lr: float) -> tuple[list[list[float]], float]:
    """AdamW with a schedule, warmup, and gradients clipped to norm 1; return the record's curve, and the CPU time."""
    in_head = {id(parameter) for parameter in head.parameters()}
    inserted = [value for value in model.parameters() if value.requires_grad and id(value) not in in_head]
    groups = [
        {"params": inserted, "lr": lr, "weight_decay": method.weight_decay},
        {"params": list(head.parameters()), "lr": task.head_lr if inserted else lr, "weight_decay": 0.0},
    ]
    if not any(group["params"] for group in groups):
        return [], 0.0
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    method.prepare_optimizer(optimizer, model, task)
    term = method.term(model, task)
    batches: list[Batch | int] = with_rehearsal(task.batches(), method.rehearsal_steps)
    warmup = math.ceil(WARMUP * len(batches))
    schedule = transformers.get_scheduler("linear", optimizer, warmup, len(batches) + 1)
    curve: list[list[float]] = []
    losses: list[float] = []
    start = time.process_time()
    for step, batch in enumerate(batches, start=1):
        loss = task.rehearsal_loss(model, batch) if isinstance(batch, int) else task.loss(model, batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        (loss + term(step)).backward()
        nn.utils.clip_grad_norm_([value for group in groups for value in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        if task.curve_steps and step % task.curve_steps == 0:
            curve.append([step, round(statistics.mean(losses), 4), round(task.validate(model), 4)])
            losses.clear()
    return curve, time.process_time() - start


def with_rehearsal(batches: Sequence[Batch], steps: int) -> list[Batch | int]:
    """The batches, and after so many of them, the number of a batch of samples to keep."""
    found: list[Batch | int] = []
    for place, batch in enumerate(batches, start=1):
        found.append(batch)
        if steps and place % steps == 0:
            found.append(place // steps - 1)
    return found


def count(module: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
