"""The base model of an adapter: its name and class, as PEFT writes them, and one row of a weight.

The row shows whether a model is the base model, the same model with the adapter folded into it, where the row is
rotated, or another one. It is stored in the metadata of an adapter's file.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hra_fx.config import HRAConfig
from hra_fx.functional.rotate import rotate_weight
from hra_fx.selection.origin import origin_of

#: Metadata key in `adapter_model.safetensors`.
BASE_ROW = "hra_fx_base_row"


def base_model_name(root: nn.Module, config: HRAConfig) -> str | None:
    """PEFT's `base_model_name_or_path`: the configured name, or the name that transformers stores."""
    return str(config.base_model_name_or_path or origin_of(root).name or "") or None


def auto_mapping(root: nn.Module, config: HRAConfig) -> dict[str, Any] | None:
    """PEFT's `auto_mapping`: the class of the base model, unless the task type determines it."""
    origin = origin_of(root)
    mapping = {"base_model_class": origin.class_name, "parent_library": origin.library}
    return config.auto_mapping or (None if config.task_type else mapping)


class BaseRow(NamedTuple):
    """The first row `(d,)` of the base weight of a layer, in float32."""

    path: str
    values: Tensor

    def compare(self, row: Tensor, chain: Tensor) -> Literal["base", "folded", "other"]:
        """Whether `row`, the same row of a model, is that of the base model, or has the adapter folded into it.

        The model is an other one if the row differs by more than 5 % from both. Rounding to 16 bits changes it by less.
        """
        base, found = self.values.double(), row.double()
        if found.shape != base.shape:
            return "other"
        from_folded, from_base = float(torch.dist(found, _rotated(base, chain))), float(torch.dist(found, base))
        if from_folded < from_base / 2:
            return "folded"
        return "base" if from_base <= 0.05 * float(base.norm()) else "other"


def write_base_row(layers: Mapping[str, nn.Module], chains: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata entry: the row that is rotated most, among all layers with a readable weight; may be empty."""
    rows = {path: row.float() for path, layer in layers.items() if (row := first_row(layer)) is not None}
    changes = {
        path: float(torch.dist(_rotated(row, chains[path]), row) / row.norm())
        for path, row in rows.items()
        if not chains[path].is_meta and bool(row.any())
    }
    path = max(changes, key=changes.__getitem__, default="")
    if not changes.get(path):
        return {}
    data = base64.b64encode(rows[path].numpy().tobytes()).decode()
    return {BASE_ROW: json.dumps({"layer": path, "row": data})}


def _rotated(row: Tensor, chain: Tensor) -> Tensor:
    return rotate_weight(row[None], chain.detach().cpu().to(row.dtype))[0]


def read_base_row(metadata: Mapping[str, str]) -> BaseRow | None:
    """The row in the metadata of a file; `None` for adapters saved by PEFT."""
    if BASE_ROW not in metadata:
        return None
    entry = json.loads(metadata[BASE_ROW])
    values = torch.frombuffer(bytearray(base64.b64decode(entry["row"])), dtype=torch.float32)
    return BaseRow(str(entry["layer"]), values)


def first_row(layer: nn.Module) -> Tensor | None:
    """The first row of a layer's base weight as `(out, d)`, on the CPU.

    `None` for layers other than Linear and Conv2d, and for quantized, sharded, offloaded and parametrized weights.
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return None
    unmerged = getattr(getattr(layer, "hra_u", None), "unmerged", None)
    weight: Any = layer._parameters.get("weight") if unmerged is None else unmerged
    # Tensor subclasses are sharded or quantized.
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or not weight.is_floating_point():
        return None
    return weight.detach()[0].flatten().cpu() if weight.dim() > 1 else None
