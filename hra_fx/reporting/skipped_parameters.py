"""Weights outside of layers that have no adapter: the 3-D parameters of experts, and how much of the model they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hra_fx.layers.experts_weight import CHILD
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.selection.parameters import expert_parameters


@dataclass(frozen=True)
class SkippedParameter:
    """A 3-D parameter, such as the weights of the experts of a layer, that has no adapter and is not trained.

    Attributes:
        path: qualified name of the parameter.
        owner_type: class of the module that it belongs to.
        shape: its shape, mostly `(experts, out, in)` or `(experts, in, out)`.
        share: its share of the parameters of the base model, from 0 to 1.
    """

    path: str
    owner_type: str
    shape: tuple[int, ...]
    share: float


def skipped_parameters(model: nn.Module) -> tuple[SkippedParameter, ...]:
    """The 3-D parameters of a model without an adapter, in model order, a shared one once.

    Example:
        >>> import torch
        >>> experts = nn.Module()
        >>> experts.up_proj = nn.Parameter(torch.zeros(4, 6, 3), requires_grad=False)
        >>> skipped_parameters(nn.ModuleDict({"experts": experts, "gate": nn.Linear(7, 4)}))
        (SkippedParameter(path='experts.up_proj', owner_type='Module', shape=(4, 6, 3), share=0.692...),)
    """
    total = sum(p.numel() for name, p in model.named_parameters() if {REFLECTION, SAVED}.isdisjoint(name.split(".")))
    return tuple(
        SkippedParameter(path, type(owner).__name__, tuple(parameter.shape), parameter.numel() / total)
        for path, (owner, parameter) in expert_parameters(model).items()
        if not parameter.requires_grad and CHILD + path.rpartition(".")[2] not in owner._modules
    )
