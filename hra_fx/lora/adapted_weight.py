"""The LoRA form of one adapted layer, whether its weight is in memory or in files: it is only multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hra_fx.functional.low_rank import WeightChange, core, weight_change
from hra_fx.layers.experts_weight import is_transposed, parameter_of
from hra_fx.layers.target import LayerKind
from hra_fx.lora.adapter import LoraLayer


@dataclass(frozen=True)
class Matrix:
    """The weight of a layer or of one expert, `W: (out, d)`, and the reflections that rotate it.

    Attributes:
        chain: `U: (d, k)`.
        out: the number of rows.
        project: makes `W V: (out, m)`, float64 on the CPU, of `V: (d, m)`; raises an error for values that are not
            finite.
    """

    chain: Tensor
    out: int
    project: Callable[[Tensor], Tensor]

    def unchanged(self) -> WeightChange:
        """A change of rank 0."""
        A = torch.zeros(0, self.chain.shape[0], dtype=torch.float64)
        return WeightChange(A, torch.zeros(self.out, 0, dtype=torch.float64), 0.0)

    def change(self, noise: float, rank: int | None) -> WeightChange:
        """The change of the weight; a weight that does not change is not read."""
        V, K = core(self.chain, noise)
        return weight_change(self.project(V), V, K, rank) if len(K) else self.unchanged()


@dataclass(frozen=True)
class AdaptedWeight:
    """The weight of an adapted layer.

    Attributes:
        path: the layer's path in the model.
        kind: the kind of layer.
        matrices: its weight; of experts, that of each.
        noise: see `hra_fx.functional.low_rank.core`.
        kernel: see `LoraLayer`.
        columns: see `LoraLayer`.
        owner: of experts, the module with their parameter, which may be without data.
        size: the size of what is read, in bytes.
    """

    path: str
    kind: LayerKind
    matrices: Sequence[Matrix]
    noise: float
    kernel: tuple[int, ...] = ()
    columns: bool = False
    owner: nn.Module | None = None
    size: int = 0

    def unchanged(self) -> LoraLayer:
        """The layer at rank 0; nothing is read."""
        return self._with([matrix.unchanged() for matrix in self.matrices])

    def as_lora(self, rank: int | None) -> LoraLayer:
        """The layer as LoRA; `rank`: the largest rank, `None` for no limit."""
        return self._with([matrix.change(self.noise, rank) for matrix in self.matrices])

    def _with(self, changes: Sequence[WeightChange]) -> LoraLayer:
        if self.owner is None:
            A, B, error = changes[0]
            return LoraLayer(self.path, self.kind, A, B, self.kernel, self.columns, error)
        longest = max(len(A) for A, _, _ in changes)
        A = torch.stack([F.pad(A, (0, 0, 0, longest - len(A))) for A, _, _ in changes])
        B = torch.stack([F.pad(B, (0, longest - B.shape[1])) for _, B, _ in changes])
        # PEFT takes the parameters of classes without `is_transposed` for `(experts, out, in)`. If they are stored the
        # other way, the two factors change places.
        if is_transposed(self.owner) and not getattr(self.owner, "is_transposed", False):
            A, B = B.mT.contiguous(), A.mT.contiguous()
        place = list(self.owner._parameters).index(parameter_of(self.path).rpartition(".")[2])
        error = max((error for *_, error in changes), default=math.nan)
        return LoraLayer(self.path, self.kind, A, B, error=error, place=place)
