"""The setting of a measurement: model, mode, size, dtype, rank and device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["training", "inference", "generate", "memory"]


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    Attributes:
        workload: a key of `WORKLOADS`.
        mode: `training` and `inference` are seconds of a step, `generate` of one call; `memory` is the peak of a
            training step in bytes.
        size: tokens or images.
        dtype: name of the dtype of the base model.
        r: rank of the adapters.
        compiled: whether the methods are compiled.
        device: `cpu` or `cuda`.
    """

    workload: str
    mode: Mode
    size: int
    dtype: str = "float32"
    r: int = 8
    compiled: bool = False
    device: str = "cpu"

    def __str__(self) -> str:
        """One line, whose words `--only` matches."""
        words = [self.workload, self.mode, str(self.size), self.dtype, f"r={self.r}"]
        return " ".join([*words, *["compiled"] * self.compiled, *["cuda"] * (self.device == "cuda")])
