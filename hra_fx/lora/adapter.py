"""An adapter in its LoRA form, independent of the file format, and the conversion of adapted layers.

The weight of a layer may be in memory or in files, because it is only multiplied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.functional.low_rank import LowRankDelta, core, low_rank_delta
from hra_fx.layers.experts_weight import is_transposed, parameter_of
from hra_fx.layers.target import LayerKind
from hra_fx.selection.suggestions import suffixes

#: HRA's `bias` -> LoRA's `bias`, from the fewest to the most biases.
_BIASES = {"none": "none", "hra_only": "lora_only", "all": "all"}


@dataclass(frozen=True)
class LoraLayer:
    """The LoRA form of one layer: its rows `W: (out, d)` become `W + B A`.

    Attributes:
        path: the layer's qualified name in the model.
        kind: the kind of layer.
        A: `(k, d)`, float64 on the CPU; for a convolution, `d` is the flattened `(in, *kernel)`; for experts,
            `(experts, k, d)`.
        B: `(out, k)`, float64 on the CPU; for experts, `(experts, out, k)`.
        kernel: the kernel size of a convolution; empty for other layers.
        fan_in_fan_out: whether the layer stores its weight as `(in, out)`, as transformers' `Conv1D` does.
        error: `|W Q - W - B A|_F / |W Q - W|_F`; 0 unless a smaller rank was requested.
        place: for experts, the position of the parameter among the parameters of its module.
    """

    path: str
    kind: LayerKind
    A: Tensor
    B: Tensor
    kernel: tuple[int, ...] = ()
    fan_in_fan_out: bool = False
    error: float = 0.0
    place: int = 0

    @property
    def rank(self) -> int:
        """The number of rows of `A`; 0 for a layer that the adapter does not change."""
        return self.A.shape[-2]

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return `A: (..., rank, d)` and `B: (..., out, rank)`, padded with zeros."""
        missing = rank - self.rank
        A = F.pad(self.A, (0, 0, 0, missing))
        return A, F.pad(self.B, (0, missing))


@dataclass(frozen=True)
class Matrix:
    """The weight of a layer or of one expert, `W: (out, d)`, and the reflections `U: (d, k)` that rotate it.

    `project` computes `W V: (out, m)`, float64 on the CPU, from `V: (d, m)`; it raises an error for values that are not
    finite.
    """

    chain: Tensor
    out: int
    project: Callable[[Tensor], Tensor]

    def change(self, noise: float, rank: int | None) -> LowRankDelta:
        """Compute the change of the weight. If the weight does not change, it is not read."""
        V, K = core(self.chain, noise)
        if len(K):
            return low_rank_delta(self.project(V), V, K, rank)
        A = torch.zeros(0, self.chain.shape[0], dtype=torch.float64)
        return LowRankDelta(A, torch.zeros(self.out, 0, dtype=torch.float64), 0.0)


@dataclass(frozen=True)
class AdaptedWeight:
    """The weight of an adapted layer, for experts the weight of each; see `LoraLayer` and `low_rank.core` (`noise`).

    `owner` is the module with the parameter of experts, which may have no data, and `size` the number of bytes to read.
    """

    path: str
    kind: LayerKind
    matrices: Sequence[Matrix]
    noise: float
    kernel: tuple[int, ...] = ()
    fan_in_fan_out: bool = False
    owner: nn.Module | None = None
    size: int = 0

    def as_lora(self, rank: int | None) -> LoraLayer:
        """Convert the layer to LoRA. `rank` is the largest rank, `None` for no limit."""
        changes = [matrix.change(self.noise, rank) for matrix in self.matrices]
        if self.owner is None:
            A, B, error = changes[0]
            return LoraLayer(self.path, self.kind, A, B, self.kernel, self.fan_in_fan_out, error)
        longest = max(len(A) for A, _, _ in changes)
        A = torch.stack([F.pad(A, (0, 0, 0, longest - len(A))) for A, _, _ in changes])
        B = torch.stack([F.pad(B, (0, longest - B.shape[1])) for _, B, _ in changes])
        # PEFT assumes `(experts, out, in)` for parameters of classes without `is_transposed`. If they are stored as
        # `(experts, in, out)`, the two factors are swapped.
        if is_transposed(self.owner) and not getattr(self.owner, "is_transposed", False):
            A, B = B.mT.contiguous(), A.mT.contiguous()
        place = list(self.owner._parameters).index(parameter_of(self.path).rpartition(".")[2])
        error = max((error for *_, error in changes), default=math.nan)
        return LoraLayer(self.path, self.kind, A, B, error=error, place=place)


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter as LoRA, independent of the file format. Fields with names of PEFT's are those of `LoraConfig`.

    `copies` are trained tensors of `modules_to_save` and biases, by their keys in PEFT's file without its prefix.
    `modules` are the paths of all modules of the model, of which `target_modules` must match only the adapted ones.
    `model_config` is the content of the model's `config.json`; empty if it has none.
    """

    layers: tuple[LoraLayer, ...]
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    modules: Collection[str] = ()
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None
    auto_mapping: Mapping[str, Any] | None = None
    base_model: str | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The common rank of all layers: the largest rank, at least 1."""
        return max([1, *(layer.rank for layer in self.layers)])


def from_configs(configs: Sequence[HRAConfig], **fields: Any) -> LoraAdapter:
    """Create one LoRA for adapters with these configurations; `fields` are the other fields of the LoRA."""
    saved = dict.fromkeys(name for config in configs for name in config.modules_to_save or ())
    return LoraAdapter(
        bias=_BIASES[max((config.bias for config in configs), key=list(_BIASES).index)],
        modules_to_save=tuple(saved),
        task_type=next((config.task_type for config in configs if config.task_type), None),
        **fields,
    )


def check_rank(rank: int | None) -> None:
    """Check the largest rank of a layer."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"`rank` must be a positive int or None, got {rank!r}.")


def exact_targets(adapted: Collection[str], modules: Collection[str]) -> list[str] | str:
    """Find the shortest names that match only the adapted layers, by PEFT's rules.

    Returns ends of paths, sorted; or a regular expression, if a path is itself the end of another path.

    >>> exact_targets(["a.q", "b.q", "a.k"], ["a", "b", "a.q", "b.q", "a.k", "b.k"])
    ['a.k', 'q']
    >>> exact_targets(["fc"], ["fc", "block", "block.fc"])
    'fc'
    """
    chosen = set(adapted)
    others = {suffix for path in modules if path not in chosen for suffix in suffixes(path)}
    short = {path: next((end for end in suffixes(path) if end not in others), None) for path in adapted}
    if None in short.values():
        return "|".join(re.escape(path) for path in adapted)
    return sorted({end for end in short.values() if end is not None})
