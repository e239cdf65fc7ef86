"""The report of a fold on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SHOWN = 4


@dataclass(frozen=True)
class CheckpointReport:
    """The result of a fold on disk.

    Attributes:
        folder: the new checkpoint.
        rotated: names of the tensors that were rotated.
        given: names of the tensors that an adapter replaced or added (`modules_to_save`, `bias`).
        untied: names of new tensors -> names of the tensors they were tied to in the base.
        rounding: largest relative error `|W'' - W'|_F / |W'|_F` of the cast to the file's dtype, measured on the first
            rows of each weight.
        roughest: the tensor with this error.
        bytes: total size of the folder.
        seconds: run time.
        kept: files that were copied although they contain weights of the base.
        verified: whether row norms and copies were checked.

    Example:
        >>> print(CheckpointReport(Path("folded"), ("a.weight",), (), {}, 1.6e-3, "a.weight", 2_300_000, 0.5))
        folded: 1 tensor rotated, 2.3 MB in 0.5 s
          relative rounding error up to 1.6e-03 (a.weight)
    """

    folder: Path
    rotated: tuple[str, ...]
    given: tuple[str, ...]
    untied: Mapping[str, str]
    rounding: float
    roughest: str
    bytes: int
    seconds: float
    kept: tuple[Path, ...] = ()
    verified: bool = False

    def __str__(self) -> str:
        """A summary in a few lines."""
        count = f"{len(self.rotated)} tensor{'s' * (len(self.rotated) != 1)} rotated"
        count += f", {len(self.given)} from the adapter" if self.given else ""
        lines = [f"{self.folder}: {count}, {file_size(self.bytes)} in {self.seconds:.1f} s"]
        if self.roughest:
            lines.append(f"  relative rounding error up to {self.rounding:.1e} ({self.roughest})")
        if self.verified:
            lines.append("  verified: row norms are preserved, everything else is identical")
        if self.untied:
            lines.append(f"  untied: {_some([f'{new} (from {old})' for new, old in self.untied.items()])}")
        if self.given:
            lines.append(f"  from the adapter: {_some(list(self.given))}")
        if self.kept:
            lines.append(f"  not folded: {_some([file.name for file in self.kept])}")
        return "\n".join(lines)


def file_size(number: int) -> str:
    """A size in bytes.

    >>> file_size(512), file_size(2_300_000)
    ('512 B', '2.3 MB')
    """
    power = max(0, min(4, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}" if power else f"{number} B"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
