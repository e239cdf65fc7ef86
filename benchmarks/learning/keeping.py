"""Methods that keep what the model knows, and all methods by name."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import hra_fx
from learning.directions import lora_layers, main_inputs, protect_lora
from learning.methods import METHODS, Method
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


#: Each runs at the learning rate of the method that it changes.
KEEPING = {
    "lora-protect": replace(METHODS["lora"], label="LoRA, protected", prepare_optimizer=protected_lora, rate_of="lora"),
    "lora-rehearse": rehearsed("lora"),
    "hra-pairs-protect": protected("hra-pairs"),
    "hra-pairs-rehearse": rehearsed("hra-pairs"),
    "hra-quiet-protect": protected("hra-quiet"),
    **{f"hra-pairs-protect-{count}": protected("hra-pairs", count) for count in (4, 32, 64)},
    "hra-pairs-protect-few": replace(protected("hra-pairs", samples=8), label="HRA, pairs, protected by 8 samples"),
    "hra-pairs-protect-other": replace(
        protected("hra-pairs", kind="other"), label="HRA, pairs, other samples protected"
    ),
}
ALL = METHODS | KEEPING
