"""The result of an export as LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoraRow:
    """One layer of an export.

    Attributes:
        path: its qualified name; in a diffusers pipeline, with its part.
        rank: the rank of its change, before it is padded; 0 if the adapter does not change it.
        error: `|W Q - W - B A|_F / |W Q - W|_F` in float64; 0 unless a smaller rank was asked for.
        rounding: the error of rounding the factors to `dtype`, relative to the change in the same way.
    """

    path: str
    rank: int
    error: float
    rounding: float


@dataclass(frozen=True)
class LoraResult:
    """The result of `hra_fx.save_as_lora` or `hra-fx convert`.

    Attributes:
        path: the folder or the file.
        format: "peft", "gguf" or "diffusers".
        rank: the rank of all layers in the file.
        dtype: of the factors, such as "float32".
        rows: one for each layer.
        warnings: what the server given by `check` does not accept.

    Example:
        >>> print(LoraResult(Path("out"), "peft", 8, "float32", (LoraRow("q_proj", 8, 0.0, 5e-8),)))
        out: 1 layer as LoRA of rank 8 (peft, float32)
          rounding error up to 5.0e-08 of the weight change (q_proj)
    """

    path: Path
    format: str
    rank: int
    dtype: str
    rows: tuple[LoraRow, ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A summary in a few lines."""
        count = f"{len(self.rows)} layer{'s' * (len(self.rows) != 1)}"
        lines = [f"{self.path}: {count} as LoRA of rank {self.rank} ({self.format}, {self.dtype})"]
        rough = max(self.rows, key=lambda row: row.rounding)
        if rough.rounding:
            lines.append(f"  rounding error up to {rough.rounding:.1e} of the weight change ({rough.path})")
        cut = max(self.rows, key=lambda row: row.error)
        if cut.error:
            lines.append(f"  error of the smaller rank up to {cut.error:.1e} of the weight change ({cut.path})")
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])
