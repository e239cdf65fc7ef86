"""Methods that keep what the model knows, and all methods by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import torch
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

import hra_fx
from learning.directions import lora_layers, main_inputs, protect_lora
from learning.methods import METHODS, Method, lora
from learning.tasks.task import CACHE, Task

#: Directions in each layer, and samples that they come from.
DIRECTIONS, SAMPLES = 16, 64


def protected(method: str, told: str = "tales", kind: str = "", directions: int = DIRECTIONS, **more: Any) -> Method:
    """HRA that does not change the main inputs of samples of some kind, which `told` names."""
    base = METHODS[method]

    def prepare(optimizer: torch.optim.Optimizer, model: nn.Module, task: Task) -> None:
        hra_fx.protect(model, task.to_keep(more.get("samples", SAMPLES), kind), directions)

    count = "" if directions == DIRECTIONS else f" ({directions} directions)"
    label = f"{base.label}, {told} protected{count}"
    return replace(base, label=label, prepare_optimizer=prepare, rescale=None, rate_of=method)


def keep_random_directions(optimizer: torch.optim.Optimizer, model: nn.Module, task: Task) -> None:
    """Protect as many directions as `protected`, which have nothing to do with the inputs."""
    for layer in model.modules():
        if isinstance(container := getattr(layer, "hra_u", None), nn.ParameterDict):
            container.keep("default", torch.linalg.qr(torch.randn(container.width, DIRECTIONS)).Q)


def protected_lora(optimizer: torch.optim.Optimizer, model: nn.Module, task: Task) -> None:
    """The same for LoRA, which hra_fx does not protect."""
    bases = main_inputs(model, lora_layers(model), task.to_keep(SAMPLES), DIRECTIONS)
    protect_lora(optimizer, model, bases)


def distant(method: Method, told: str, kind: str, *, weight: float = 1.0, rows: int = 2, every: int = 1) -> Method:
    """A method whose loss has the distance to the base model, on some rows of samples of some kind, in some steps."""

    def term(model: nn.Module, task: Task) -> Callable[[int], Tensor | float]:
        batches = itertools.cycle(task.to_keep(SAMPLES, kind, rows))
        return lambda step: 0.0 if step % every else weight * task.distance(model, next(batches))

    return replace(method, label=f"{method.label}, distance on {told}", term=term, rescale=None)


def rehearsed(method: str) -> Method:
    """A method that also trains on a batch of samples to keep after every nine batches."""
    label = f"{METHODS[method].label}, rehearsal"
    return replace(METHODS[method], label=label, rehearsal_steps=9, rescale=None, rate_of=method)


def corda(model: nn.Module, task: Task, rank: int) -> None:
    """LoRA that starts where samples to keep have the least; PEFT changes the base weights for it."""
    from peft.tuners.lora.corda import preprocess_corda  # needs attrs

    settings = CordaConfig(
        corda_method="kpm", cache_file=None if task.tiny else str(CACHE / f"corda-{task.name}-{rank}.pt")
    )
    config = lora(task, rank, init_lora_weights="corda", corda_config=settings)
    rows = [row for batch in task.to_keep(SAMPLES) for row in batch.split(1)]
    with torch.no_grad():
        preprocess_corda(model, config, run_model=lambda: [model(row) for row in rows])
    peft.inject_adapter_in_model(config, model)


def osf(model: nn.Module, task: Task, rank: int) -> None:
    """OSF that trains as many of the smallest singular values of each weight as LoRA's rank."""
    layers = ((path, layer) for path, layer in model.named_modules() if path.endswith(tuple(task.targets)))
    frozen = {f"^{path}$": min(layer.weight.shape) - rank for path, layer in layers}
    peft.inject_adapter_in_model(peft.OSFConfig(target_modules=task.targets, rank_pattern=frozen), model)


LORA, PAIRS = (replace(METHODS[name], rescale=None, rate_of=name) for name in ("lora", "hra-pairs"))
OWN = ("own texts", "own")

#: Most run at the learning rate of the method that they change.
KEEPING = {
    "lora-decay": replace(LORA, label="LoRA, weight decay 0.3", weight_decay=0.3),
    "lora-protect": replace(LORA, label="LoRA, tales protected", prepare_optimizer=protected_lora),
    "lora-rehearse": rehearsed("lora"),
    "lora-distance-own": distant(LORA, *OWN),
    "corda": Method("CorDA, knowledge preserved", (5.5e-4, 1e-3, 1.7e-3, 3e-3), corda),
    "osf": Method("OSF", (1.7e-3, 3e-3, 5.5e-3, 1e-2), osf),
    "hra-pairs-rehearse": rehearsed("hra-pairs"),
    "hra-pairs-protect": protected("hra-pairs"),
    "hra-pairs-protect-own": protected("hra-pairs", *OWN),
    "hra-pairs-protect-random": protected("hra-pairs", "random tokens", "random"),
    "hra-pairs-protect-directions": replace(
        PAIRS, label="HRA, pairs, random directions protected", prepare_optimizer=keep_random_directions
    ),
    **{f"hra-pairs-protect-{count}": protected("hra-pairs", directions=count) for count in (4, 32, 64)},
    "hra-pairs-protect-few": protected("hra-pairs", "8 tales", samples=8),
    "hra-pairs-protect-other": protected("hra-pairs", "tweets", "other"),
    "hra-pairs-distance": distant(PAIRS, "tales", ""),
    "hra-pairs-distance-own": distant(PAIRS, *OWN),
    "hra-pairs-distance-own-one": distant(PAIRS, "own texts, one passage", "own", rows=1),
    "hra-pairs-distance-own-second": distant(PAIRS, "own texts, every second step", "own", every=2),
    "hra-pairs-distance-own-0.3": distant(PAIRS, "own texts, weight 0.3", "own", weight=0.3),
    "hra-pairs-distance-own-3": distant(PAIRS, "own texts, weight 3", "own", weight=3.0),
    "hra-pairs-both-own": distant(protected("hra-pairs", *OWN), *OWN),
}
ALL = METHODS | KEEPING
