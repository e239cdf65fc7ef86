"""The base model of an adapter: its name and class, as PEFT writes them, and one row of a weight.

The row is in the metadata of the adapter's file. It shows whether a model already has the adapter in its weights.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.config import HRAConfig
from hra_fx.functional.rotate import rotate_weight
from hra_fx.selection.origin import origin_of

#: The metadata key.
BASE_ROW = "hra_fx_base_row"


def base_model_name(root: nn.Module, config: HRAConfig) -> str | None:
    """PEFT's `base_model_name_or_path`: the configured name, or the name that transformers stores."""
    return str(config.base_model_name_or_path or origin_of(root).name or "") or None


def auto_mapping(root: nn.Module, config: HRAConfig) -> dict[str, Any] | None:
    """PEFT's `auto_mapping`: the class of the base model, unless the task type determines it."""
    origin = origin_of(root)
    mapping = {"base_model_class": origin.class_name, "parent_library": origin.library}
    return config.auto_mapping or (None if config.task_type else mapping)


def base_row(layers: Mapping[str, nn.Module], chains: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata with the first row of the layer whose first row is rotated most; empty if no row can be read."""
    rows = {path: row.float() for path, layer in layers.items() if (row := _first_row(layer)) is not None}
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


def layer_with_adapter(
    metadata: Mapping[str, str], layers: Mapping[str, nn.Module], chains: Mapping[str, Tensor]
) -> str | None:
    """The path of the layer that shows that a model already has the adapter in its weights; `None` if it does not.

    Its row is then nearer to the rotated row than to that of the base model. Rounding to 16 bits is far less.
    """
    entry = json.loads(metadata.get(BASE_ROW, "{}"))
    row = _first_row(layers[entry["layer"]]) if entry.get("layer") in layers else None
    if row is None:
        return None
    path = str(entry["layer"])
    base = torch.frombuffer(bytearray(base64.b64decode(entry["row"])), dtype=torch.float32).double()
    if row.shape != base.shape:
        return None
    folded = float(torch.dist(row.double(), _rotated(base, chains[path])))
    return path if folded < float(torch.dist(row.double(), base)) / 2 else None


def _rotated(row: Tensor, chain: Tensor) -> Tensor:
    return rotate_weight(row[None], chain.detach().cpu().to(row.dtype))[0]


def _first_row(layer: nn.Module) -> Tensor | None:
    """The first row of the base weight as `(out, d)`, on the CPU; `None` if it is not a plain Linear or Conv2d."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return None
    unmerged = getattr(getattr(layer, "hra_u", None), "unmerged", None)
    weight: Any = layer._parameters.get("weight") if unmerged is None else unmerged
    # Tensor subclasses are sharded or quantized.
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or not weight.is_floating_point():
        return None
    return weight.detach()[0].flatten().cpu() if weight.dim() > 1 else None
