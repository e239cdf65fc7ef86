"""The content of an adapter's two files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from hra_fx.checkpoint.base_model import layer_with_adapter
from hra_fx.checkpoint.folder import PREFIX, WEIGHTS_NAME, find, read, read_metadata
from hra_fx.config import HRAConfig
from hra_fx.errors import CheckpointError
from hra_fx.functional.chain import GRAM_SCHMIDT, chain_of
from hra_fx.layers.target import REFLECTION


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter's two files. `tensors` have the keys of the file, with PEFT's prefix."""

    file: Path
    config: HRAConfig
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @cached_property
    def chains(self) -> dict[str, Tensor]:
        """Path of a layer -> `U: (d, k)` or `(experts, d, k)`, plain reflections; float64 after Gram-Schmidt."""
        keys = {key.removeprefix(PREFIX).rpartition("."): key for key in self.tensors}
        chains = {path: self.tensors[key] for (path, _, last), key in keys.items() if last == REFLECTION}
        if not chains:
            raise CheckpointError(
                f"{self.file}: no vectors found (keys that end in {REFLECTION!r}). Save the adapter again."
            )
        if self.config.apply_GS:
            chains = {path: chain_of(GRAM_SCHMIDT, chain.double()) for path, chain in chains.items()}
        return chains

    @property
    def others(self) -> list[str]:
        """The names of the other tensors in the file: those that are trained in full, and copies that PEFT adds."""
        return [key.removeprefix(PREFIX) for key in self.tensors if not key.endswith(REFLECTION)]

    def check_not_in(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Check that the adapter is not in the weights of a model already. `layers` are its layers in the model."""
        if seen := layer_with_adapter(self.metadata, layers, self.chains):
            raise CheckpointError(
                f"This {type(model).__name__} already contains the adapter {self.file} or a very similar one, folded "
                f"into its weights (seen in {seen}). Use the base model that the adapter was trained on."
            )


def read_adapter(source: str | os.PathLike[str], config: HRAConfig | None = None) -> Adapter:
    """Read an adapter saved by `save_adapter` or PEFT, from a folder or the Hub, in the order of block numbers.

    `config` replaces the configuration in the folder; the vectors are then used as stored.
    """
    folder = find(source)
    file = folder / WEIGHTS_NAME
    stored = read(file)
    own = HRAConfig.from_pretrained(folder) if config is None else config
    keys = sorted(stored, key=lambda key: re.sub(r"\d+", lambda number: number[0].zfill(9), key).split("."))
    for key in keys:
        vectors, what = stored[key], ""
        if key.endswith(f".{REFLECTION}") and not vectors.is_floating_point():
            what = f"has dtype {vectors.dtype}, but vectors are floating-point numbers"
        elif key.endswith(f".{REFLECTION}") and vectors.dim() > 1 and not vectors.double().ne(0).any(-2).all():
            what = "has a vector of zeros, which has no direction to reflect"
        if what:
            raise CheckpointError(f"{file}: {key} {what}. The file is damaged: save or download the adapter again.")
    return Adapter(file, own, {key: stored[key] for key in keys}, read_metadata(file))
