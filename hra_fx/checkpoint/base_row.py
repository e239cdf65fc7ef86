"""Recognize a folded base model, which already contains an adapter: adding the adapter again would rotate twice.

The metadata of an adapter's file keeps one row of a base weight. In the folded model, this row is rotated.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hra_fx.errors import CheckpointError
from hra_fx.functional.rotate import rotate_weight

#: Metadata key in `adapter_model.safetensors`.
BASE_ROW = "hra_fx_base_row"


class BaseRow(NamedTuple):
    """The first row of a base weight.

    Attributes:
        path: the layer.
        values: `(d,)`, float32.
    """

    path: str
    values: Tensor

    def check(self, file: Path, chain: Tensor, row: Tensor | None, base: str) -> None:
        """Check that a base model does not contain the adapter.

        Args:
            file: the adapter's weights.
            chain: `U: (d, k)` of the layer.
            row: the first row of the layer's weight in the base model; `None` if it cannot be read.
            base: the base model, for the message.

        Raises:
            CheckpointError: it does. Bases that differ in other ways are not refused.
        """
        if row is None or row.shape != self.values.shape or len(chain) != len(row):
            return
        before, found = self.values.double(), row.double()
        rotated = rotate_weight(before[None], chain.double())[0]
        # Rounding to 16 bits moves a row less than a trained adapter does.
        if torch.dist(found, rotated) < torch.dist(found, before) / 2:
            raise CheckpointError(
                f"{base}: already contains the adapter {file}, which was folded into it: the weight of {self.path} is "
                "rotated. Use the base model that the adapter was trained on, or restore it with hra-fx unfold."
            )


def write_base_row(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The metadata entry for the first layer whose weight can be read; none if there is no such layer."""
    for path, layer in layers.items():
        row = first_row(layer)
        if row is not None:
            data = base64.b64encode(row.float().numpy().tobytes()).decode()
            return {BASE_ROW: json.dumps({"layer": path, "row": data})}
    return {}


def read_base_row(metadata: Mapping[str, str]) -> BaseRow | None:
    """The row in the metadata of a file; adapters saved by PEFT have none."""
    if BASE_ROW not in metadata:
        return None
    entry = json.loads(metadata[BASE_ROW])
    return BaseRow(entry["layer"], torch.frombuffer(bytearray(base64.b64decode(entry["row"])), dtype=torch.float32))


def first_row(layer: nn.Module) -> Tensor | None:
    """The first row of a layer's base weight as `(out, d)`, on the CPU.

    `None` for layers other than Linear and Conv2d, and for quantized, sharded, offloaded and parametrized weights.
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return None
    unmerged = getattr(getattr(layer, "hra_u", None), "unmerged", None)
    weight: Any = layer._parameters.get("weight") if unmerged is None else unmerged
    # Subclasses of tensors are sharded or quantized.
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or not weight.is_floating_point():
        return None
    return weight.detach()[0].flatten().cpu() if weight.dim() > 1 else None
