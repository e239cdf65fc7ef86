"""The LoRA form of experts whose weights are on disk, in one tensor or in several for each expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hra_fx.checkpoint.disk.rotation import Rotation
from hra_fx.checkpoint.disk.stored import StoredTensor
from hra_fx.layers.experts_weight import parameter_of
from hra_fx.layers.target import LayerKind
from hra_fx.lora.adapter import LoraLayer
from hra_fx.lora.disk.stored_change import stored_change
from hra_fx.lora.layer_form import stacked_layer


@dataclass(frozen=True)
class StoredExperts:
    """The adapted experts in one parameter of a model.

    Attributes:
        path: the path of the layer that stands for the parameter, as the adapter names it.
        owner: the module with the parameter, without data.
        experts: the tensors with the weight of each expert, in the order of its outputs, and what adapters do to it.
        noise: see `hra_fx.functional.low_rank.core`.
    """

    path: str
    owner: nn.Module
    experts: Sequence[Sequence[tuple[StoredTensor, Rotation]]]
    noise: float
    kind: LayerKind = "experts"

    @property
    def size(self) -> int:
        """The size of the weights in bytes."""
        return sum(stored.size for parts in self.experts for stored, _ in parts)

    def unchanged(self) -> LoraLayer:
        """The experts at rank 0."""
        changes = []
        for parts in self.experts:
            out = sum(stored.shape[1 if rotation.columns else 0] for stored, rotation in parts)
            A = torch.zeros(0, parts[0][1].chain.shape[0], dtype=torch.float64)
            changes.append((A, torch.zeros(out, 0, dtype=torch.float64), 0.0))
        return stacked_layer(self.path, self.owner, self._parameter, changes)

    def convert(self, rank: int | None, advance: Callable[[int], object]) -> LoraLayer:
        """The experts as LoRA; see `convert_layers`."""
        changes = [stored_change(parts, self.noise, rank, advance) for parts in self.experts]
        return stacked_layer(self.path, self.owner, self._parameter, changes)

    @property
    def _parameter(self) -> str:
        return parameter_of(self.path).rpartition(".")[2]
