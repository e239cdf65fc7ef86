"""What a fold on disk did, in numbers and names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SHOWN = 4


@dataclass(frozen=True)
class CheckpointReport:
    """What was written.

    Attributes:
        folder: the new checkpoint.
        rotated: names of the tensors that were rotated.
        given: names of those that came from an adapter (`modules_to_save`, `bias`).
        untied: new names -> those that they were tied to in the base.
        rounding: the largest `|W'' - W'|_F / |W'|_F`, what the cast to the dtype of the file costs; measured on the
            first rows of each weight.
        roughest: the tensor that it was found in.
        bytes: size of all that is in the folder.
        seconds: how long it took.
        reused: how many files an interrupted call before had finished.
        kept: files that were copied, and hold weights of the base still.
        verified: whether lengths of rows and copies were checked.

    Example:
        >>> print(CheckpointReport(Path("folded"), ("a.weight",), (), {}, 1.6e-3, "a.weight", 2_300_000, 0.5))
        folded: 1 tensor rotated, 2.3 MB in 0.5 s
          rounding at most 1.6e-03 (a.weight)
    """

    folder: Path
    rotated: tuple[str, ...]
    given: tuple[str, ...]
    untied: Mapping[str, str]
    rounding: float
    roughest: str
    bytes: int
    seconds: float
    reused: int = 0
    kept: tuple[Path, ...] = ()
    verified: bool = False

    def __str__(self) -> str:
        """A few lines."""
        count = f"{len(self.rotated)} tensor{'s' * (len(self.rotated) != 1)} rotated"
        count += f", {len(self.given)} from the adapter" if self.given else ""
        lines = [f"{self.folder}: {count}, {_size(self.bytes)} in {self.seconds:.1f} s"]
        lines.append(f"  rounding at most {self.rounding:.1e} ({self.roughest})")
        if self.verified:
            lines.append("  verified: rows have the lengths they had, and all else is equal byte for byte")
        if self.untied:
            lines.append(f"  untied: {_some([f'{new} (from {old})' for new, old in self.untied.items()])}")
        if self.given:
            lines.append(f"  from the adapter: {_some(list(self.given))}")
        if self.reused:
            were = "file was" if self.reused == 1 else "files were"
            lines.append(f"  {self.reused} {were} finished by a call before this one")
        if self.kept:
            lines.append(f"  with the base's weights still: {_some([file.name for file in self.kept])}")
        return "\n".join(lines)


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "B" else f"{count} B"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
