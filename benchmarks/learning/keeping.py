"""Methods that keep what the model knows, and controls, each at the learning rate of the method that it changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import hra_fx
from learning.directions import (
    Choice,
    hra_layers,
    lora_layers,
    main_inputs,
    of_energy,
    protect_hra,
    protect_lora,
    start_in_low_directions,
    top,
)
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
    return replace(base, label=base.label + told, prepare_optimizer=prepare)


def with_directions(
    method: str, label: str, choose: Choice, use: Callable[..., None], layers: Callable[[nn.Module], Any] = hra_layers
) -> Method:
    """A method whose parameters stay orthogonal to other directions of the samples to keep."""
    base = METHODS[method]

    def prepare(optimizer: torch.optim.Optimizer, model: nn.Module, task: Task) -> None:
        base.prepare_optimizer(optimizer, model, task)
        use(optimizer, model, main_inputs(model, layers(model), task.to_keep(SAMPLES), choose))

    return replace(base, label=f"{base.label}, {label}", prepare_optimizer=prepare)


def rehearsed(method: str) -> Method:
    """A method that also trains on a sample to keep after every nine batches."""
    return replace(METHODS[method], label=f"{METHODS[method].label}, rehearsal", rehearsal_steps=9)


def low_start() -> Method:
    """Pairs that start where the weight is smallest."""
    base = METHODS["hra-pairs"]

    def insert(model: nn.Module, task: Task, rank: int) -> None:
        base.insert(model, task, rank)
        start_in_low_directions(model)

    return replace(base, label="HRA, pairs in low directions of W", insert=insert)


#: Name -> the method that it changes, and the changed one.
KEEPING: dict[str, tuple[str, Method]] = {
    "lora-protect": ("lora", with_directions("lora", "protected", top(DIRECTIONS), protect_lora, lora_layers)),
    "lora-rehearse": ("lora", rehearsed("lora")),
    "hra-pairs-protect": ("hra-pairs", protected("hra-pairs")),
    "hra-pairs-rehearse": ("hra-pairs", rehearsed("hra-pairs")),
    "hra-quiet-protect": ("hra-quiet", protected("hra-quiet")),
}
#: The same, with few seeds.
CONTROLS: dict[str, tuple[str, Method]] = {
    **{f"hra-pairs-protect-{k}": ("hra-pairs", protected("hra-pairs", k)) for k in (4, 32, 64)},
    "hra-pairs-protect-energy": (
        "hra-pairs",
        with_directions("hra-pairs", "80% of the energy protected", of_energy(0.8), protect_hra),
    ),
    "hra-pairs-protect-energy-16": (
        "hra-pairs",
        with_directions("hra-pairs", "80% of the energy, but at least 16", of_energy(0.8, DIRECTIONS), protect_hra),
    ),
    "hra-pairs-protect-few": (
        "hra-pairs",
        replace(protected("hra-pairs", samples=8), label="HRA, pairs, protected by 8 samples"),
    ),
    "hra-pairs-protect-other": (
        "hra-pairs",
        replace(protected("hra-pairs", kind="other"), label="HRA, pairs, other samples protected"),
    ),
    "hra-pairs-low": ("hra-pairs", low_start()),
}
