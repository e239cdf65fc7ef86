"""Read the two files of an adapter without a model: a chain of reflections for each layer, and trained tensors.

PEFT does not have anchors, so the chain of an adapter with anchors is saved as plain reflections. The metadata of the
file says how to split the chain into a frozen anchor and trained vectors, so that training can be continued.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from hra_fx.checkpoint.base_model import BaseRow, read_base_row
from hra_fx.checkpoint.folder import WEIGHTS_NAME, find, read
from hra_fx.checkpoint.keys import EXTRA_BIASES, PREFIX, VECTORS, reflection_key
from hra_fx.config import HRAConfig
from hra_fx.errors import CheckpointError, FoldError
from hra_fx.functional.chain import plain_chain
from hra_fx.functional.householder import anchor_rank
from hra_fx.functional.low_rank import anchor_noise
from hra_fx.functional.statistics import inverse_condition
from hra_fx.layers.experts_weight import stands_for_parameter
from hra_fx.layers.target import REFLECTION

#: Metadata key in `adapter_model.safetensors`.
RESUME = "hra_fx"
_BIASES = ("bias", "in_proj_bias")


@dataclass(frozen=True)
class Resume:
    """The form of an adapter for training.

    Attributes:
        config: the configuration for training; the configuration in the file has the ranks of the plain chains.
        has_anchors: whether the chains start with the anchors of `householder.init_vectors`.
    """

    config: HRAConfig
    has_anchors: bool

    def anchor(self, path: str) -> int:
        """The number of anchor vectors of a layer."""
        return anchor_rank(self.config.rank_of(path), apply_GS=self.config.apply_GS) if self.has_anchors else 0

    @property
    def chains(self) -> HRAConfig:
        """The configuration of the plain chains, which is saved."""
        return _chains(self.config) if self.has_anchors else self.config

    def metadata(self) -> dict[str, str]:
        """The entry for the file's metadata; empty without anchors."""
        if not self.has_anchors:
            return {}
        config = self.config
        anchor = anchor_rank(config.r, apply_GS=config.apply_GS)
        ranks = {"rank_pattern": config.rank_pattern} if config.rank_pattern else {}
        return {RESUME: json.dumps({"r": config.r, "apply_GS": config.apply_GS, "anchor": anchor, **ranks})}


def read_resume(file: Path, metadata: Mapping[str, str], config: HRAConfig) -> Resume:
    """Read the form for training from the metadata of a file and its configuration. PEFT's files have no anchors.

    Raises:
        CheckpointError: the metadata does not match the configuration.
    """
    if RESUME not in metadata:
        return Resume(config, has_anchors=False)
    try:
        entry = json.loads(metadata[RESUME])
        trained = HRAConfig.from_dict(
            {
                **config.to_dict(),
                "r": int(entry["r"]),
                "apply_GS": bool(entry["apply_GS"]),
                "rank_pattern": entry.get("rank_pattern", {}),
            }
        )
        anchor = anchor_rank(trained.r, apply_GS=trained.apply_GS)
        if _chains(trained) == config != trained and int(entry["anchor"]) == anchor:
            return Resume(trained, has_anchors=True)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        pass
    raise CheckpointError(
        f"{file}: the metadata {RESUME}={metadata[RESUME][:80]!r} does not match r={config.r}, "
        f"apply_GS={config.apply_GS} in the configuration. The two files are from different adapters; save it again."
    )


def _chains(config: HRAConfig) -> HRAConfig:
    """The configuration of `[A | U]`, or `[A | V]`."""

    def rank(r: int) -> int:
        return r + anchor_rank(r, apply_GS=config.apply_GS)

    ranks = {pattern: rank(r) for pattern, r in config.rank_pattern.items()}
    # If the ranks are equal with the anchors, no pattern is needed. PEFT does not support patterns.
    differ = any(r != rank(config.r) for r in ranks.values())
    return dataclasses.replace(config, r=rank(config.r), apply_GS=False, rank_pattern=ranks if differ else {})


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter's two files.

    Attributes:
        file: the weights file.
        config: the configuration.
        tensors: all tensors, by their keys with PEFT's prefix.
        metadata: metadata of the weights file, without entries that the caller's configuration replaces.
        base_row: a row of the base model; `None` in PEFT's files.
    """

    file: Path
    config: HRAConfig
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    base_row: BaseRow | None

    @cached_property
    def resume(self) -> Resume:
        """Return how to split the chains into anchors and trained vectors.

        Raises:
            CheckpointError: the metadata does not match the configuration.
        """
        return read_resume(self.file, self.metadata, self.config)

    @cached_property
    def chains(self) -> dict[str, Tensor]:
        """Path of a layer -> `U: (d, k)`, plain reflections, in the dtype of the file, float64 after Gram-Schmidt.

        Chains of experts are `(experts, d, k)`.

        Raises:
            CheckpointError: the file has no vectors, or their shapes do not match the configuration.
            FoldError: the vectors for Gram-Schmidt are linearly dependent.
        """
        keys = {key.removeprefix(PREFIX).rpartition("."): key for key in self.tensors}
        chains = {path: self._chain(path, key) for (path, _, last), key in keys.items() if last == REFLECTION}
        if not chains:
            raise CheckpointError(
                f"{self.file}: no vectors found (keys that end in {REFLECTION!r}). Save the adapter again."
            )
        return chains

    @cached_property
    def full(self) -> dict[str, Tensor]:
        """Name of a fully trained tensor -> its value."""
        return {name: tensor for name, tensor in self._others.items() if self._is_trained(name)}

    @cached_property
    def embeddings(self) -> dict[str, Tensor]:
        """Name of a copied tensor of the base model -> its value."""
        return {name: tensor for name, tensor in self._others.items() if not self._is_trained(name)}

    @cached_property
    def _others(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, tensor in self.tensors.items():
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if key.endswith((f".{REFLECTION}", f".{VECTORS}")):
                continue
            if self.config.bias == "all" and EXTRA_BIASES.search(key):
                continue
            if name in found:
                raise _twice(self.file, f"{PREFIX}{name}", "'.base_layer.'")
            found[name] = tensor
        return found

    def _is_trained(self, name: str) -> bool:
        path, _, last = name.rpartition(".")
        return self.saves(path) or (self.config.bias != "none" and last in _BIASES)

    def _chain(self, path: str, key: str) -> Tensor:
        tensor, config = self.tensors[key], self.config
        r, of_experts = config.rank_of(path), bool(config.target_parameters) and stands_for_parameter(path)
        if tensor.dim() != 2 + of_experts or tensor.shape[-1] != r:
            shape = f"({'experts, ' * of_experts}d, {r})"
            raise CheckpointError(
                f"{self.file}: {key} must have shape {shape}, got {tuple(tensor.shape)}: the configuration says "
                f"r={r}. The two files are from different adapters; save it again."
            )
        if config.apply_GS and (r > tensor.shape[-2] or inverse_condition(tensor) < _tolerance(tensor.dtype)):
            raise FoldError(
                f"{self.file}: {key}: its {r} vectors of length {tensor.shape[-2]} are linearly dependent, so "
                "Gram-Schmidt is not defined. Train with apply_GS=False, or with init_weights=True in hra_fx, which "
                "starts from independent vectors."
            )
        return plain_chain(tensor.double() if config.apply_GS else tensor, None, apply_GS=config.apply_GS)

    def saves(self, path: str) -> bool:
        """Whether a module or one of its parents is in `modules_to_save`. As in PEFT, entries match ends of paths."""
        names = tuple(self.config.modules_to_save or ())
        parts = path.split(".")
        return bool(names) and any(".".join(parts[:i]).endswith(names) for i in range(1, len(parts) + 1))

    def noise(self, path: str) -> float:
        """The largest distance of a new adapter's `Q` from the identity; 0 for a layer that it does not adapt."""
        config = self.resume.config
        if not (config.apply_GS and self.resume.has_anchors and path in self.chains):
            return 0.0
        return anchor_noise(config.rank_of(path), self.tensors[reflection_key(path)].dtype)


def read_adapter(source: str | os.PathLike[str], config: HRAConfig | None = None) -> Adapter:
    """Read an adapter saved by `save_adapter` or PEFT.

    Args:
        source: the folder of the adapter, or its name on the Hub.
        config: replaces the configuration in the folder; the vectors are then used as stored.

    Raises:
        CheckpointError: a file is missing or damaged, or the two files do not match.
        ConfigError: the configuration is invalid.
    """
    folder = find(source)
    own = HRAConfig.from_pretrained(folder) if config is None else config
    file = folder / WEIGHTS_NAME
    stored, metadata = read(file)
    # Some writers leave out PEFT's prefix.
    if twice := next((key for key in stored if f"{PREFIX}{key}" in stored), None):
        raise _twice(file, twice, f"the prefix {PREFIX!r}")
    tensors = {key if key.startswith(PREFIX) else f"{PREFIX}{key}": tensor for key, tensor in stored.items()}
    return Adapter(file, own, tensors, metadata if config is None else {}, read_base_row(file, metadata))


def _twice(file: Path, key: str, part: str) -> CheckpointError:
    return CheckpointError(f"{file}: duplicate key {key}, with and without {part}. Save the adapter again.")


def _tolerance(dtype: torch.dtype) -> float:
    """The inverse condition below which vectors count as dependent. For float8 (eps 1/8), most vectors would."""
    return min(8 * torch.finfo(dtype).eps, 1 / 16)
