"""Changes of a checkpoint's tensors: rotations and replacements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from hra_fx.checkpoint.disk.header import StoredTensor


@dataclass(frozen=True)
class Rotation:
    """`W -> W Q`.

    Attributes:
        path: the layer's name in the adapter.
        chain: `U: (d, k)` of `Q`, float64.
        columns: whether the weight is `(in, out)`.
    """

    path: str
    chain: Tensor
    columns: bool


@dataclass(frozen=True)
class Replacement:
    """A new value, in the checkpoint's dtype."""

    tensor: Tensor


Edit: TypeAlias = Rotation | Replacement


@dataclass(frozen=True)
class Item:
    """A tensor of a planned file.

    Attributes:
        name: its key.
        shape: its shape.
        size: its size in bytes.
        source: the tensor of the base; `None` for a new tensor.
        edit: the change; `None` for a copy.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    source: StoredTensor | None
    edit: Edit | None


@dataclass(frozen=True)
class FilePlan:
    """A planned safetensors file.

    Attributes:
        name: relative to the folder of the checkpoint.
        head: its header.
        items: its tensors, in the order of the data.
    """

    name: str
    head: bytes
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.head) + sum(item.size for item in self.items)
