"""What happens to a tensor of a checkpoint: it is rotated, or another one comes in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from hra_fx.checkpoint.disk.header import Stored


@dataclass(frozen=True)
class Rotation:
    """`W -> W Q`.

    Attributes:
        path: the layer, as the adapter calls it.
        chain: `U: (d, k)` of `Q`, float64.
        columns: whether the weight is `(in, out)`.
    """

    path: str
    chain: Tensor
    columns: bool


@dataclass(frozen=True)
class Given:
    """Another tensor, in the dtype of the checkpoint."""

    tensor: Tensor


Edit: TypeAlias = Rotation | Given


@dataclass(frozen=True)
class Item:
    """A tensor of a file that is to be written.

    Attributes:
        name: its key.
        shape: its shape.
        size: its bytes.
        source: what it is made from; `None` for one that the base does not have.
        edit: what happens to it; `None` for a copy.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    source: Stored | None
    edit: Edit | None


@dataclass(frozen=True)
class FilePlan:
    """A safetensors file that is to be written.

    Attributes:
        name: relative to the folder of the checkpoint.
        head: its bytes up to the data.
        items: its tensors, in the order of the data.
    """

    name: str
    head: bytes
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return len(self.head) + sum(item.size for item in self.items)
