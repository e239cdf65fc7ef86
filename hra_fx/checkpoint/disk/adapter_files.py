"""Read an adapter for a fold on disk: a chain of reflections for each layer, and fully trained tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hra_fx.checkpoint.base_row import BaseRow, read_base_row
from hra_fx.checkpoint.folder import WEIGHTS_NAME, find
from hra_fx.checkpoint.keys import EXTRA_BIASES, PREFIX, VECTORS, reflection_key
from hra_fx.checkpoint.resume import Resume, read_resume
from hra_fx.checkpoint.weights import read_prefixed
from hra_fx.config import HRAConfig
from hra_fx.errors import CheckpointError, FoldError
from hra_fx.functional.chain import plain_chain
from hra_fx.functional.low_rank import anchor_noise
from hra_fx.functional.statistics import inverse_condition
from hra_fx.layers.experts_weight import stands_for_parameter
from hra_fx.layers.target import REFLECTION

_BIASES = ("bias", "in_proj_bias")


@dataclass(frozen=True)
class AdapterFiles:
    """The content of an adapter's two files.

    Attributes:
        file: the weights file.
        config: the configuration.
        tensors: all tensors, by their keys with PEFT's prefix.
        metadata: of the weights file.
        base_row: a row of the base model; `None` in files of PEFT.
        resume: how the chains split into anchors and trained vectors.
        chains: path of a layer -> `U: (d, k)`, plain reflections, in the dtype of the file, float64 after Gram-Schmidt;
            of experts, `(experts, d, k)`.
        full: name of a fully trained tensor -> its value.
        embeddings: name of a copied tensor of the base model -> its value.
    """

    file: Path
    config: HRAConfig
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    base_row: BaseRow | None
    resume: Resume
    chains: dict[str, Tensor]
    full: dict[str, Tensor]
    embeddings: dict[str, Tensor]

    def saves(self, path: str) -> bool:
        """Whether a module, or one around it, is in `modules_to_save`; as in PEFT, entries match ends of paths."""
        names = tuple(self.config.modules_to_save or ())
        parts = path.split(".")
        return bool(names) and any(".".join(parts[:i]).endswith(names) for i in range(1, len(parts) + 1))

    def noise(self, path: str) -> float:
        """How far the `Q` of a fresh adapter may be from the identity; 0 for a layer that it does not adapt."""
        config = self.resume.config
        if not (config.apply_GS and self.resume.has_anchors and path in self.chains):
            return 0.0
        return anchor_noise(config.rank_of(path), self.tensors[reflection_key(path)].dtype)


def read_adapter(source: str | os.PathLike[str]) -> AdapterFiles:
    """Read an adapter saved by `save_adapter` or PEFT.

    Raises:
        CheckpointError: a file is missing or damaged, or the two do not match.
        ConfigError: the configuration is invalid.
        FoldError: Gram-Schmidt of linearly dependent vectors.
    """
    folder = find(source)
    config = HRAConfig.from_pretrained(folder)
    file = folder / WEIGHTS_NAME
    tensors, metadata = read_prefixed(file)
    resume = read_resume(file, metadata, config)
    chains: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path, _, last = key.removeprefix(PREFIX).rpartition(".")
        if last == REFLECTION:
            chains[path] = _chain(file, key, tensor, config)
        elif last != VECTORS and not (config.bias == "all" and EXTRA_BIASES.search(key)):
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if name in others:
                raise CheckpointError(
                    f"{file}: duplicate key {key}, with and without '.base_layer.'. Save the adapter again."
                )
            others[name] = tensor
    if not chains:
        raise CheckpointError(f"{file}: no vectors found (keys that end in {REFLECTION!r}). Save the adapter again.")
    adapter = AdapterFiles(file, config, tensors, metadata, read_base_row(file, metadata), resume, chains, {}, {})
    for name, tensor in others.items():
        path, _, last = name.rpartition(".")
        full = adapter.saves(path) or (config.bias != "none" and last in _BIASES)
        (adapter.full if full else adapter.embeddings)[name] = tensor
    return adapter


def _chain(file: Path, key: str, tensor: Tensor, config: HRAConfig) -> Tensor:
    path = key.removeprefix(PREFIX).rpartition(".")[0]
    r, of_experts = config.rank_of(path), bool(config.target_parameters) and stands_for_parameter(path)
    if tensor.dim() != 2 + of_experts or tensor.shape[-1] != r:
        shape = f"({'experts, ' * of_experts}d, {r})"
        raise CheckpointError(
            f"{file}: {key} must have shape {shape}, got {tuple(tensor.shape)}: the configuration says "
            f"r={r}. The two files are from different adapters; save it again."
        )
    if config.apply_GS:
        rank = f"{r} vectors of length {tensor.shape[-2]}"
        # By the same rule, all vectors in 8 bits would be dependent.
        least = min(8 * torch.finfo(tensor.dtype).eps, 1 / 16)
        if r > tensor.shape[-2] or inverse_condition(tensor) < least:
            raise FoldError(
                f"{file}: {key}: its {rank} are linearly dependent, so Gram-Schmidt is not defined. Train with "
                "apply_GS=False, or with init_weights=True in hra_fx, which starts from independent vectors."
            )
    return plain_chain(tensor.double() if config.apply_GS else tensor, None, apply_GS=config.apply_GS)
