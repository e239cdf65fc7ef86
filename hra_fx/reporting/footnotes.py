"""What is said below a table: why regions are not larger, and which layers carry no reflections; each thing once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from hra_fx.reporting.row import Row
from hra_fx.reporting.skipped_layers import Missed

# So many reasons, and so many names for each, tell what happened; the rest is in the data.
_REASONS = 6
_NAMES = 5


@dataclass(frozen=True)
class Remark:
    """A heading with lines below it."""

    heading: str
    lines: tuple[str, ...]


def remarks(rows: Collection[Row], missed: Collection[Missed]) -> list[Remark]:
    """The remarks on a report, those that have something to say."""
    found = [
        Remark("Why regions are not larger:", tuple(_condensed(row.region_reason for row in rows))),
        Remark(f"Without reflections: {len(missed):,} layer{'s' * (len(missed) != 1)}", tuple(_left_out(missed))),
        Remark("Q is not orthogonal:", tuple(_rough(rows))),
    ]
    return [remark for remark in found if remark.lines]


def _condensed(reasons: Iterable[str]) -> list[str]:
    """Reasons that differ only in a layer's number, once, with the number of times."""
    counted: dict[str, int] = {}
    for reason in dict.fromkeys(reasons):
        if reason:
            key = _starred(reason)
            counted[key] = counted.get(key, 0) + 1
    return [f"{reason} ({count} times)" if count > 1 else reason for reason, count in counted.items()]


def _left_out(missed: Collection[Missed]) -> list[str]:
    """The layers by reason; those that differ only in a number once, with the number of times."""
    by_reason: dict[str, dict[str, int]] = {}
    for layer in missed:
        names = by_reason.setdefault(layer.reason, {})
        names[_starred(layer.path)] = names.get(_starred(layer.path), 0) + 1
    lines = [f"{_listed(names)}: {reason}" for reason, names in by_reason.items()]
    if len(lines) <= _REASONS:
        return lines
    rest = sum(sum(names.values()) for names in list(by_reason.values())[_REASONS:])
    return [*lines[:_REASONS], f"{rest:,} more, for {len(lines) - _REASONS} other reasons"]


def _listed(names: dict[str, int]) -> str:
    shown = [f"{name} ({count})" if count > 1 else name for name, count in names.items()]
    rest = sum(list(names.values())[_NAMES:])
    return ", ".join(shown[:_NAMES]) + f" and {rest:,} more" * (rest > 0)


def _rough(rows: Collection[Row]) -> list[str]:
    """What no user should ever see: a `Q` so far from orthogonal that the model computes something else."""
    rough = [row for row in rows if row.orthogonality > 1e-3]
    if not rough:
        return []
    worst = max(rough, key=lambda row: row.orthogonality)
    return [f"|Q'Q - I| is up to {worst.orthogonality:.0e}, at {worst.path} ({worst.adapter})"]


def _starred(text: str) -> str:
    """A path, or a text with paths, with stars for the numbers in them."""
    return re.sub(r"(?<![^\s.])\d+(?=[. ])|(?<=\.)\d+(?=[. ]|$)", "*", text)
