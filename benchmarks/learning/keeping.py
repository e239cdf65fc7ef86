"""Methods that keep what the model knows, and all methods by name."""

from __future__ import annotations

from dataclasses import replace

import peft
import torch
from peft.tuners.lora.config import CordaConfig
from torch import nn

import hra_fx
from learning.directions import lora_layers, main_inputs, protect_lora
from learning.methods import METHODS, Method, lora
from learning.tasks.task import Task

#: Directions in each layer, and samples that they come from.
DIRECTIONS, SAMPLES = 16, 64


def protected(method: str, directions: int = DIRECTIONS, samples: int = SAMPLES, kind: str = "") -> Method:
    """HRA that keeps its vectors orthogonal to the main inputs of samples of some kind."""
    base = METHODS[method]

    def prepare(optimizer: torch.optim.Optimizer, model: nn.Module, task: Task) -> None:
        base.prepare_optimizer(optimizer, model, task)
        hra_fx.protect(optimizer, model, task.to_keep(samples, kind), directions)

    told = ", protected" if directions == DIRECTIONS else f", {directions} directions protected"
    return replace(base, label=base.label + told, prepare_optimizer=prepare, rate_of=method)


def protected_lora(optimizer: torch.optim.Optimizer, model: nn.Module, task: Task) -> None:
    """The same for LoRA, which hra_fx does not protect."""
    bases = main_inputs(model, lora_layers(model), task.to_keep(SAMPLES), DIRECTIONS)
    protect_lora(optimizer, model, bases)


def rehearsed(method: str) -> Method:
    """A method that also trains on a batch of samples to keep after every nine batches."""
    return replace(METHODS[method], label=f"{METHODS[method].label}, rehearsal", rehearsal_steps=9, rate_of=method)


def corda(model: nn.Module, task: Task, rank: int) -> None:
    """LoRA that starts where samples to keep have the least; PEFT changes the base weights for it."""
    from peft.tuners.lora.corda import preprocess_corda  # needs attrs

    config = lora(task, rank, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    rows = [row for batch in task.to_keep(SAMPLES) for row in batch.split(1)]
    with torch.no_grad():
        preprocess_corda(model, config, run_model=lambda: [model(row) for row in rows])
    peft.inject_adapter_in_model(config, model)


def osf(model: nn.Module, task: Task, rank: int) -> None:
    """OSF that trains as many of the smallest singular values of each weight as LoRA's rank."""
    layers = ((path, layer) for path, layer in model.named_modules() if path.endswith(tuple(task.targets)))
    frozen = {f"^{path}$": min(layer.weight.shape) - rank for path, layer in layers}
    peft.inject_adapter_in_model(peft.OSFConfig(target_modules=task.targets, rank_pattern=frozen), model)


#: Most run at the learning rate of the method that they change.
KEEPING = {
    "lora-protect": replace(METHODS["lora"], label="LoRA, protected", prepare_optimizer=protected_lora, rate_of="lora"),
    "lora-rehearse": rehearsed("lora"),
    "lora-decay": replace(METHODS["lora"], label="LoRA, weight decay 0.3", weight_decay=0.3, rate_of="lora"),
    "corda": Method("CorDA, knowledge preserved", (5.5e-4, 1e-3, 1.7e-3, 3e-3), corda),
    "osf": Method("OSF", (1.7e-3, 3e-3, 5.5e-3, 1e-2), osf),
    "hra-pairs-protect": protected("hra-pairs"),
    "hra-pairs-rehearse": rehearsed("hra-pairs"),
    **{f"hra-pairs-protect-{count}": protected("hra-pairs", count) for count in (4, 32, 64)},
    "hra-pairs-protect-few": replace(protected("hra-pairs", samples=8), label="HRA, pairs, protected by 8 samples"),
    "hra-pairs-protect-other": replace(
        protected("hra-pairs", kind="other"), label="HRA, pairs, other samples protected"
    ),
}
ALL = METHODS | KEEPING
