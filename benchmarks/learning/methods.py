"""The methods that are compared: how each changes a model, and from which learning rates the best is chosen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import peft
import torch
from torch import Tensor, nn

import hra_fx
from learning.tasks.task import Task

#: Adds an adapter of some rank to the layers that a task names.
Insert = Callable[[nn.Module, Task, int], None]


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        label: its name in tables.
        rates: the learning rates that a search starts with, in rising order; as many for every method that trains.
        insert: adds the adapter and freezes all other parameters.
        rank: the rank whose number of parameters is nearest to that of LoRA, from the shapes `(out, in)` of the
            layers and LoRA's rank; 0 where a method has no rank.
        penalty: a term of the loss.
        weight_decay: that of AdamW, for what is inserted.
        prepare_optimizer: called with the optimizer, the model and the task before the first step.
        rehearsal_steps: a batch of samples to keep follows so many batches; 0 for never.
        rate_of: the method whose learning rate it has, if it has none of its own.
    """

    label: str
    rates: Sequence[float]
    insert: Insert
    rank: Callable[[Sequence[tuple[int, int]], int], int] = lambda shapes, lora_rank: lora_rank
    penalty: Callable[[nn.Module], Tensor] | None = None
    weight_decay: float = 0.0
    prepare_optimizer: Callable[[torch.optim.Optimizer, nn.Module, Task], None] = lambda optimizer, model, task: None
    rehearsal_steps: int = 0
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


def of_peft(make: Callable[[Sequence[str], int], peft.PeftConfig]) -> Insert:
    """Insert with PEFT."""

    def insert(model: nn.Module, task: Task, rank: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(make(task.targets, rank), model)

    return insert


def lora(targets: Sequence[str], rank: int, *, dora: bool = False, factor: int = 2) -> peft.PeftConfig:
    """LoRA with `lora_alpha = factor * r`."""
    return peft.LoraConfig(r=rank, lora_alpha=factor * rank, target_modules=list(targets), use_dora=dora)


def oft(targets: Sequence[str], size: int) -> peft.PeftConfig:
    """OFT with blocks of some size."""
    return peft.OFTConfig(r=0, oft_block_size=size, target_modules=list(targets))


def boft(targets: Sequence[str], size: int) -> peft.PeftConfig:
    """BOFT with blocks of some size. Without PEFT's CUDA extension, more than one butterfly factor fails."""
    return peft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=1, target_modules=list(targets))


def psoft(targets: Sequence[str], rank: int) -> peft.PeftConfig:
    """PSOFT as PEFT's benchmark has it."""
    return peft.PsoftConfig(r=rank, psoft_alpha=rank, target_modules=list(targets))


def of_hra_fx(**fields: object) -> Insert:
    """Insert with `hra_fx.transform`."""

    def insert(model: nn.Module, task: Task, rank: int) -> None:
        hra_fx.transform(model, hra_fx.HRAConfig(r=rank, target_modules=list(task.targets), **fields))

    return insert


def in_pairs(optimizer: torch.optim.Optimizer, model: nn.Module, task: Task) -> None:
    """Train in pairs."""
    hra_fx.train_pairs(optimizer, model)


def in_quiet_pairs(optimizer: torch.optim.Optimizer, model: nn.Module, task: Task) -> None:
    """Train in pairs whose differences are orthogonal to the main inputs of two batches."""
    hra_fx.train_pairs(optimizer, model, batches=[task.model_inputs(batch) for batch in task.batches()[:2]])


def freeze(model: nn.Module, task: Task, rank: int) -> None:
    """Add nothing."""
    model.requires_grad_(False)


def train_all(model: nn.Module, task: Task, rank: int) -> None:
    """Add nothing, and train everything."""
    model.requires_grad_(True)


def weighted(weight: float) -> Callable[[nn.Module], Tensor]:
    """The orthogonality regularizer with a weight."""
    return lambda model: weight * hra_fx.orthogonality_loss(model)


SMALL, MIDDLE, LARGE = (3e-5, 1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2, 1e-1)

METHODS = {
    "base": Method("before training", (), freeze, lambda shapes, rank: 0),
    "head": Method("head only", (1e-3, 3e-3, 1e-2, 3e-2), freeze, lambda shapes, rank: 0),
    "lora": Method("LoRA", MIDDLE, of_peft(lora)),
    "lora-alpha-r": Method("LoRA, lora_alpha = r", MIDDLE, of_peft(partial(lora, factor=1))),
    "lora-2r": Method("LoRA, 2 r", MIDDLE, of_peft(lora), lambda shapes, rank: 2 * rank),
    "dora": Method("DoRA", MIDDLE, of_peft(lambda targets, rank: lora(targets, rank, dora=True))),
    "oft": Method("OFT", MIDDLE, of_peft(oft), matched(lambda out, width, size: width * (size - 1) / 2, POWERS)),
    "boft": Method("BOFT", MIDDLE, of_peft(boft), matched(lambda out, width, size: width * size + out, POWERS)),
    "psoft": Method("PSOFT", MIDDLE, of_peft(psoft), matched(lambda out, width, r: r * (r + 3) / 2, range(1, 1025))),
    "road": Method(
        "RoAd",
        MIDDLE,
        of_peft(lambda targets, rank: peft.RoadConfig(target_modules=list(targets))),
        lambda shapes, rank: 0,
    ),
    "miss": Method(
        "MiSS",
        MIDDLE,
        of_peft(lambda targets, rank: peft.MissConfig(r=rank, target_modules=list(targets))),
        matched(lambda out, width, r: r * out, range(1, 1025)),
    ),
    "hra-peft": Method(
        "HRA of PEFT",
        LARGE,
        of_peft(lambda targets, rank: peft.HRAConfig(r=rank, target_modules=list(targets))),
        reflections,
    ),
    "hra": Method("HRA, vectors", LARGE, of_hra_fx(), reflections),
    "hra-pairs": Method("HRA, pairs", MIDDLE, of_hra_fx(), reflections, prepare_optimizer=in_pairs),
    "hra-quiet": Method("HRA, quiet pairs", MIDDLE, of_hra_fx(), reflections, prepare_optimizer=in_quiet_pairs),
    "hra-gs": Method("HRA, Gram-Schmidt", LARGE, of_hra_fx(apply_GS=True), reflections),
    "hra-reg": Method("HRA, regularizer 1e-3", LARGE, of_hra_fx(), reflections, penalty=weighted(1e-3)),
    "full": Method("full fine-tuning", SMALL, train_all, lambda shapes, rank: 0),
}
