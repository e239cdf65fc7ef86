"""The LoRA form of layers whose weights are on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from hra_fx.checkpoint.disk.rotation import Rotation
from hra_fx.checkpoint.disk.stored import StoredTensor
from hra_fx.checkpoint.disk.writing import bar
from hra_fx.layers.target import LayerKind
from hra_fx.lora.adapter import LoraLayer
from hra_fx.lora.disk.experts import StoredExperts
from hra_fx.lora.disk.stored_change import stored_change

_THREADS = min(4, os.cpu_count() or 1)
#: Number of dimensions of a weight -> kind of layer.
_KINDS: dict[int, LayerKind] = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}


@dataclass(frozen=True)
class StoredLayer:
    """An adapted layer.

    Attributes:
        path: its path, as the adapter names it.
        stored: its weight.
        rotation: what the adapters do to it.
        noise: see `hra_fx.functional.low_rank.core`.
    """

    path: str
    stored: StoredTensor
    rotation: Rotation
    noise: float

    @property
    def size(self) -> int:
        """The size of the weight in bytes."""
        return self.stored.size

    @property
    def kind(self) -> LayerKind:
        """The kind of layer."""
        return "attention" if self.stored.name.endswith("in_proj_weight") else _KINDS[len(self.stored.shape)]

    def unchanged(self) -> LoraLayer:
        """The layer at rank 0."""
        width = self.rotation.chain.shape[0]
        out = self.stored.shape[1 if self.rotation.columns else 0]
        A, B = torch.zeros(0, width, dtype=torch.float64), torch.zeros(out, 0, dtype=torch.float64)
        return LoraLayer(self.path, self.kind, A, B, self.stored.shape[2:], self.rotation.columns)

    def convert(self, rank: int | None, advance: Callable[[int], object]) -> LoraLayer:
        """The layer as LoRA; see `convert_layers`."""
        A, B, error = stored_change([(self.stored, self.rotation)], self.noise, rank, advance)
        return LoraLayer(self.path, self.kind, A, B, self.stored.shape[2:], self.rotation.columns, error)


def convert_layers(
    layers: Sequence[StoredLayer | StoredExperts], rank: int | None, *, progress: bool
) -> Iterator[LoraLayer]:
    """The LoRA form of layers, in their order.

    Several are converted at a time, because reading and multiplying block on different parts of the machine.

    Args:
        layers: the layers.
        rank: the largest rank. `None`: no limit.
        progress: show a progress bar on a terminal.

    Raises:
        CheckpointError: a weight is not finite, or its file is too short.
    """
    total = sum(layer.size for layer in layers)
    with bar("reading weights", total, wanted=progress) as advance, ThreadPoolExecutor(_THREADS, "hra_fx-lora") as pool:
        tasks = [pool.submit(layer.convert, rank, advance) for layer in layers]
        try:
            for task in tasks:
                yield task.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
