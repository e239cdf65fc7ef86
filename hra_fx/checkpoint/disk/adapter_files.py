"""An adapter as a fold on disk needs it: a chain for each layer, and the tensors that were trained in full."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hra_fx.checkpoint.folder import WEIGHTS_NAME, find
from hra_fx.checkpoint.keys import PREFIX, VECTORS
from hra_fx.checkpoint.weights import read
from hra_fx.config import CONFIG_NAME, HRAConfig
from hra_fx.errors import CheckpointError, FoldError
from hra_fx.functional.statistics import inverse_condition
from hra_fx.layers.adapters import plain_chain
from hra_fx.layers.target import REFLECTION

#: What PEFT writes besides, with bias="all", of a module that it saves in full.
_BESIDES = re.compile(r"\.(original_module|modules_to_save)\.")
_BIASES = ("bias", "in_proj_bias")


@dataclass(frozen=True)
class AdapterFiles:
    """What the two files of an adapter say.

    Attributes:
        file: that of the weights.
        config: the configuration.
        chains: path of a layer -> `U: (d, k)`, float64, plain reflections.
        full: name of a tensor -> what goes in its place.
        embeddings: name of a tensor -> what it was in the base model.
        digest: of both files.
    """

    file: Path
    config: HRAConfig
    chains: dict[str, Tensor]
    full: dict[str, Tensor]
    embeddings: dict[str, Tensor]
    digest: str

    def saves(self, path: str) -> bool:
        """Whether a module is, or lies in, one that is saved in full; as in PEFT an entry ends its path."""
        names = tuple(self.config.modules_to_save or ())
        parts = path.split(".")
        return bool(names) and any(".".join(parts[:i]).endswith(names) for i in range(1, len(parts) + 1))


def read_adapter(source: str | os.PathLike[str]) -> AdapterFiles:
    """Read an adapter that `save_adapter` or PEFT wrote.

    Raises:
        CheckpointError: a file is missing or damaged, or the two do not fit each other.
        ConfigError: the configuration is broken.
        FoldError: Gram-Schmidt of vectors that depend on each other.
    """
    folder = find(source)
    config = HRAConfig.from_pretrained(folder)
    file = folder / WEIGHTS_NAME
    tensors, _ = read(file)
    chains: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path, _, last = key.removeprefix(PREFIX).rpartition(".")
        if last == REFLECTION:
            if path in chains:
                raise _twice(file, key)
            chains[path] = _chain(file, key, tensor, config)
        elif last != VECTORS and not (config.bias == "all" and _BESIDES.search(key)):
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if name in others:
                raise _twice(file, key)
            others[name] = tensor
    if not chains:
        raise CheckpointError(f"{file}: has no vectors (keys that end in {REFLECTION!r}). Save the adapter again.")
    digest = _digest([folder / CONFIG_NAME, file])
    adapter = AdapterFiles(file, config, chains, {}, {}, digest)
    for name, tensor in others.items():
        path, _, last = name.rpartition(".")
        full = adapter.saves(path) or (config.bias != "none" and last in _BIASES)
        (adapter.full if full else adapter.embeddings)[name] = tensor
    return adapter


def _chain(file: Path, key: str, tensor: Tensor, config: HRAConfig) -> Tensor:
    if tensor.dim() != 2 or tensor.shape[1] != config.r:
        raise CheckpointError(
            f"{file}: {key} has shape {tuple(tensor.shape)}, and its configuration says r={config.r}. One of the two "
            "files is of another adapter; save it again."
        )
    if config.apply_GS:
        rank = f"{config.r} vectors of length {tensor.shape[0]}"
        # Of 8 bits a vector has so few that by the same rule every one would depend on others.
        least = min(8 * torch.finfo(tensor.dtype).eps, 1 / 16)
        if config.r > tensor.shape[0] or inverse_condition(tensor) < least:
            raise FoldError(
                f"{file}: {key}: its {rank} are linearly dependent, and Gram-Schmidt of such vectors is noise. Train "
                "with apply_GS=False, or with init_weights=True from hra_fx, which starts them apart."
            )
    return plain_chain(tensor.double(), None, apply_GS=config.apply_GS)


def _digest(files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()


def _twice(file: Path, key: str) -> CheckpointError:
    return CheckpointError(f"{file}: {key} is there twice, with {PREFIX!r} before and without. Save it again.")
