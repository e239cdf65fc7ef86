"""What may help HRA to learn, tried on validation data only."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from learning.methods import METHODS, of_hra_fx, weighted
from learning.tasks.task import Task

HRA = METHODS["hra"]
#: The rates of unit vectors: an entry is about 1 / sqrt(width), a fifth of what it is otherwise for a width of 384.
UNIT = (1e-3, 3e-3, 1e-2, 3e-2)

#: How many batches the gradients come from.
GRADIENT_BATCHES = 8


def vectors(model: nn.Module) -> list[nn.Parameter]:
    """The trained vectors, `(width, r)` each."""
    return [value for name, value in model.named_parameters() if ".hra_u." in name and value.requires_grad]


@torch.no_grad()
def to_unit_length(model: nn.Module) -> None:
    """Divide each vector by its length, which changes no output."""
    for value in vectors(model):
        value.div_(value.norm(dim=0))


@torch.no_grad()
def to_starting_length(model: nn.Module) -> None:
    """Give the vectors of a layer the mean length at which PEFT's start draws them: `sqrt(2 width / (3 r))`."""
    for value in vectors(model):
        width, rank = value.shape
        value.mul_((2 * width / (3 * rank)) ** 0.5 / value.norm(dim=0))


def unit_start(model: nn.Module, task: Task, rank: int) -> None:
    """HRA with vectors of length 1."""
    HRA.insert(model, task, rank)
    to_unit_length(model)


def independent_start(model: nn.Module, task: Task, rank: int) -> None:
    """HRA that starts at the base model with independent vectors: the base weight is turned back by their product."""
    of_hra_fx(init_weights=False)(model, task, rank)
    with torch.no_grad():
        for layer in adapted(model):
            layer.hra_base.copy_(turned_back(layer.hra_base, layer.hra_u["default"]))


def gradient_start(model: nn.Module, task: Task, rank: int) -> None:
    """HRA whose pairs of vectors start in the planes in which a rotation lowers the loss most steeply.

    With the gradient `G` of `W`, rotating by `exp(t S)` changes the loss by `t <W^T G, S>` at first order.
    """
    HRA.insert(model, task, rank)
    layers = adapted(model)
    for layer in layers:
        layer.hra_base.requires_grad_(True)
    for batch in task.batches()[:GRADIENT_BATCHES]:
        task.loss(model, batch).backward()
    for layer in layers:
        product = layer.hra_base.flatten(1).T @ layer.hra_base.grad.flatten(1)
        planes = torch.linalg.svd(product - product.T).U[:, :rank:2]
        columns = layer.hra_u["default"]
        with torch.no_grad():
            columns.copy_(planes.repeat_interleave(2, dim=1) * columns.norm(dim=0))
        layer.hra_base.requires_grad_(False)
        layer.hra_base.grad = None
    model.zero_grad()


def adapted(model: nn.Module) -> list[nn.Module]:
    """The layers with an adapter."""
    return [module for module in model.modules() if hasattr(module, "hra_u")]


def turned_back(weight: Tensor, columns: Tensor) -> Tensor:
    """`W Q^T`, so that `(W Q^T) Q = W`; `Q` is the product of the reflections by the columns."""
    turned = weight.flatten(1).double()
    for column in reversed(columns.double().unbind(dim=1)):
        unit = column / column.norm()
        turned = turned - 2 * torch.outer(turned @ unit, unit)
    return turned.reshape(weight.shape).to(weight.dtype)


VARIANTS = {
    "hra-unit": replace(HRA, label="unit vectors at the start", insert=unit_start, rates=UNIT),
    "hra-unit-kept": replace(
        HRA, label="unit vectors after each step", insert=unit_start, rates=UNIT, after_step=to_unit_length
    ),
    "hra-renorm": replace(HRA, label="length kept after each step", after_step=to_starting_length),
    "hra-independent": replace(HRA, label="independent vectors at the start", insert=independent_start),
    "hra-gradient": replace(HRA, label="vectors from gradients of 8 batches at the start", insert=gradient_start),
    "hra-decay": replace(HRA, label="weight decay 0.1", weight_decay=0.1),
    "hra-decay-1": replace(HRA, label="weight decay 1", weight_decay=1.0),
    "hra-cosine": replace(HRA, label="cosine schedule", schedule="cosine"),
    "hra-constant": replace(HRA, label="constant rate", schedule="constant_with_warmup"),
    "hra-reg-1e-4": replace(HRA, label="regularizer 1e-4", penalty=weighted(1e-4)),
    "hra-reg-1e-2": replace(HRA, label="regularizer 1e-2", penalty=weighted(1e-2)),
}
ALL = METHODS | VARIANTS
