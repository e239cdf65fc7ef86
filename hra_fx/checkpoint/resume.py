"""How a saved chain of reflections splits into a frozen anchor and trained vectors.

PEFT has no anchors, so the chain of an adapter with anchors is saved as plain reflections. The metadata of the file
says how it was made, so that training can go on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hra_fx.config import HRAConfig
from hra_fx.errors import CheckpointError
from hra_fx.functional.householder import anchor_rank

#: Metadata key in `adapter_model.safetensors`.
RESUME = "hra_fx"


@dataclass(frozen=True)
class Resume:
    """An adapter as it is trained.

    Attributes:
        config: its configuration; that of the file has the ranks of the plain chains.
        has_anchors: whether the chains start with the anchors of `householder.init_vectors`.
    """

    config: HRAConfig
    has_anchors: bool

    def anchor(self, path: str) -> int:
        """The number of anchor vectors of a layer."""
        return anchor_rank(self.config.rank_of(path), apply_GS=self.config.apply_GS) if self.has_anchors else 0

    @property
    def chains(self) -> HRAConfig:
        """The configuration of the plain chains, as it is saved."""
        return _chains(self.config) if self.has_anchors else self.config

    def metadata(self) -> dict[str, str]:
        """The entry of the file's metadata; none without anchors."""
        if not self.has_anchors:
            return {}
        config = self.config
        anchor = anchor_rank(config.r, apply_GS=config.apply_GS)
        ranks = {"rank_pattern": config.rank_pattern} if config.rank_pattern else {}
        return {RESUME: json.dumps({"r": config.r, "apply_GS": config.apply_GS, "anchor": anchor, **ranks})}


def read_resume(file: Path, metadata: Mapping[str, str], config: HRAConfig) -> Resume:
    """What was trained, from the metadata of a file and its configuration. Adapters saved by PEFT have no anchors.

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
    # Ranks that the anchors make equal need no pattern, which PEFT does not know.
    differ = any(r != rank(config.r) for r in ranks.values())
    return dataclasses.replace(config, r=rank(config.r), apply_GS=False, rank_pattern=ranks if differ else {})
