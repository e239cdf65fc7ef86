"""The methods that are compared: how each changes a model, and from which learning rates the best is chosen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import hra_fx
from learning.tasks.task import Task

#: Adds an adapter of some rank to the layers that a task names.
Insert = Callable[[nn.Module, Task, int], None]
#: Sets the part of its change that a trained model keeps, from the model, its base, the part, and the part it has now.
Rescale = Callable[[nn.Module, nn.Module, float, float], None]


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        label: its name in tables.
        rates: the learning rates that a search starts with, in rising order; as many for every method that trains.
        insert: adds the adapter and freezes all other parameters.
        rank: the rank whose number of parameters is nearest to that of LoRA, from the shapes `(out, in)` of the
            layers and LoRA's rank; 0 where a method has no rank.
        weight_decay: that of AdamW, for what is inserted.
        prepare_optimizer: called with the optimizer, the model and the task before the first step.
        term: a term of the loss, from the number of a step; made from the model and the task before the first one.
        rehearsal_steps: a batch of samples to keep follows so many batches; 0 for never.
        rescale: moves the trained model back towards the base model; see `Rescale`.
        rate_of: the method whose learning rate it has, if it has none of its own.
    """

    label: str
    rates: Sequence[float]
    insert: Insert
    rank: Callable[[Sequence[tuple[int, int]], int], int] = lambda shapes, lora_rank: lora_rank
    weight_decay: float = 0.0
    prepare_optimizer: Callable[[torch.optim.Optimizer, nn.Module, Task], None] = lambda optimizer, model, task: None
    term: Callable[[nn.Module, Task], Callable[[int], Tensor | float]] = lambda model, task: lambda step: 0.0
    rehearsal_steps: int = 0
    rescale: Rescale | None = None
    rate_of: str = ""


def layer_shapes(model: nn.Module, targets: Sequence[str]) -> list[tuple[int, int]]:
    """`(out, in)` of each layer that is named; a convolution's `in` counts the elements of its kernel."""
    return [
        # A quantized weight is packed, so its shape does not tell.
        (module.out_features, module.in_features)
        if isinstance(module, nn.Linear)
        else (len(module.weight), module.weight[0].numel())
        for name, module in model.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    ]


def matched(parameters: Callable[[int, int, int], float], sizes: Sequence[int]) -> Callable[..., int]:
    """The rank of a method, among some, whose number of parameters is nearest to that of LoRA.

    Args:
        parameters: those of a layer, from `out`, `in` and the rank.
        sizes: the ranks.
    """

    def rank(shapes: Sequence[tuple[int, int]], lora_rank: int) -> int:
        wanted = lora_rank * sum(out + width for out, width in shapes)
        return min(sizes, key=lambda size: abs(sum(parameters(*shape, size) for shape in shapes) - wanted))

    return rank


POWERS = [2**power for power in range(1, 8)]
#: The even number of vectors.
reflections = matched(lambda out, width, count: count * width, range(2, 1025, 2))


def of_peft(make: Callable[[Task, int], peft.PeftConfig]) -> Insert:
    """Insert with PEFT."""

    def insert(model: nn.Module, task: Task, rank: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(make(task, rank), model)

    return insert


def lora(task: Task, rank: int, *, factor: int = 2, **fields: Any) -> peft.LoraConfig:
    """A configuration with `lora_alpha = factor * r`, in layers with a larger rank too."""
    ranks = {target: rank + more for target, more in task.more_rank.items()}
    alphas = {target: factor * more for target, more in ranks.items()}
    return peft.LoraConfig(
        r=rank,
        lora_alpha=factor * rank,
        target_modules=task.targets,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        **fields,
    )


def oft(task: Task, size: int) -> peft.PeftConfig:
    """OFT with blocks of some size."""
    return peft.OFTConfig(r=0, oft_block_size=size, target_modules=task.targets)


def boft(task: Task, size: int) -> peft.PeftConfig:
    """BOFT with blocks of some size. Without PEFT's CUDA extension, more than one butterfly factor fails."""
    return peft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=1, target_modules=task.targets)


def psoft(task: Task, rank: int) -> peft.PeftConfig:
    """PSOFT as PEFT's benchmark has it."""
    return peft.PsoftConfig(r=rank, psoft_alpha=rank, target_modules=task.targets)


def of_hra_fx(**fields: object) -> Insert:
    """Insert with `hra_fx.transform`."""

    def insert(model: nn.Module, task: Task, rank: int) -> None:
        ranks = {target: rank + 2 * more for target, more in task.more_rank.items()}
        config = hra_fx.HRAConfig(r=rank, target_modules=task.targets, rank_pattern=ranks, **fields)
        hra_fx.transform(model, config)

    return insert


def freeze(model: nn.Module, task: Task, rank: int) -> None:
    """Add nothing."""
    model.requires_grad_(False)


def train_all(model: nn.Module, task: Task, rank: int) -> None:
    """Add nothing, and train everything."""
    model.requires_grad_(True)


def rescale_lora(model: nn.Module, base: nn.Module, scale: float, before: float) -> None:
    """LoRA's own scale."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", scale)


def rescale_hra(model: nn.Module, base: nn.Module, scale: float, before: float) -> None:
    """A part of the rotation."""
    hra_fx.set_scale(model, "default", scale)


@torch.no_grad()
def rescale_all(model: nn.Module, base: nn.Module, scale: float, before: float) -> None:
    """On the straight line between the weights of the base model and the trained ones."""
    for value, start in zip(model.parameters(), base.parameters(), strict=True):
        value.lerp_(start, 1 - scale / before)


SMALL, MIDDLE, LARGE = (3e-5, 1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2, 1e-1)

METHODS = {
    "base": Method("before training", (), freeze, lambda shapes, rank: 0),
    "head": Method("head only", (1e-3, 3e-3, 1e-2, 3e-2), freeze, lambda shapes, rank: 0),
    "lora": Method("LoRA", MIDDLE, of_peft(lora), rescale=rescale_lora),
    "lora-alpha-r": Method("LoRA, lora_alpha = r", MIDDLE, of_peft(partial(lora, factor=1))),
    "dora": Method("DoRA", MIDDLE, of_peft(partial(lora, use_dora=True))),
    "oft": Method("OFT", MIDDLE, of_peft(oft), matched(lambda out, width, size: width * (size - 1) / 2, POWERS)),
    "boft": Method("BOFT", MIDDLE, of_peft(boft), matched(lambda out, width, size: width * size + out, POWERS)),
    "psoft": Method("PSOFT", MIDDLE, of_peft(psoft), matched(lambda out, width, r: r * (r + 3) / 2, range(1, 1025))),
    "road": Method(
        "RoAd",
        MIDDLE,
        of_peft(lambda task, rank: peft.RoadConfig(target_modules=task.targets)),
        lambda shapes, rank: 0,
    ),
    "miss": Method(
        "MiSS",
        MIDDLE,
        of_peft(lambda task, rank: peft.MissConfig(r=rank, target_modules=task.targets)),
        matched(lambda out, width, r: r * out, range(1, 1025)),
    ),
    "hra-peft": Method(
        "HRA of PEFT",
        LARGE,
        of_peft(lambda task, rank: peft.HRAConfig(r=rank, target_modules=task.targets)),
        reflections,
    ),
    "hra": Method("HRA, vectors", LARGE, of_hra_fx(pairs=False), reflections),
    "hra-pairs": Method("HRA, pairs", MIDDLE, of_hra_fx(), reflections, rescale=rescale_hra),
    "hra-gs": Method("HRA, Gram-Schmidt", LARGE, of_hra_fx(apply_GS=True), reflections),
    "full": Method("full fine-tuning", SMALL, train_all, lambda shapes, rank: 0, rescale=rescale_all),
}
