"""Footnotes of a report: which layers have no adapter and why (each reason once), and possible errors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hra_fx.reporting.columns import starred
from hra_fx.reporting.row import Row
from hra_fx.reporting.skipped_layers import SkippedLayer, SkippedParameter

# Limits of a printed report. The data contain all reasons and names.
_REASONS = 6
_NAMES = 5
#: `|Q^T Q - I|` above this is an error, not rounding.
_NOT_ORTHOGONAL = 1e-3


@dataclass(frozen=True)
class Footnote:
    """A heading with lines below it."""

    heading: str
    lines: tuple[str, ...]


def footnotes(
    rows: Collection[Row],
    skipped: Collection[SkippedLayer],
    trained_in_full: Collection[str] = (),
    parameters: Collection[SkippedParameter] = (),
) -> list[Footnote]:
    """The footnotes of a report that are not empty.

    Args:
        rows: the rows of the report.
        skipped: the layers without an adapter.
        trained_in_full: paths of the layers that are trained in full.
        parameters: the 3-D parameters without an adapter.
    """
    trained = (_listed(_counted(trained_in_full)),) if trained_in_full else ()
    lost, others = ([layer for layer in skipped if layer.targeted is wanted] for wanted in (True, False))
    share = sum(parameter.share for parameter in parameters)
    found = [
        Footnote(f"Targeted, but not adapted: {_layers(lost)}", tuple(_by_reason(lost))),
        Footnote(f"Not adapted: 3-D parameters, {share:.1%} of the base model", tuple(_experts(parameters))),
        Footnote("Not traced as one graph:", tuple(_untraced(rows))),
        Footnote("Trained in full:", trained),
        Footnote(f"Not adapted: {_layers(others)}", tuple(_by_reason(others))),
        Footnote("Q is not orthogonal:", tuple(_not_orthogonal(rows))),
    ]
    return [footnote for footnote in found if footnote.lines]


def _layers(layers: Collection[SkippedLayer]) -> str:
    return f"{len(layers):,} layer{'s' * (len(layers) != 1)}"


def _experts(parameters: Collection[SkippedParameter]) -> list[str]:
    counted = _counted([parameter.path for parameter in parameters])
    names = list(dict.fromkeys(".".join(parameter.path.split(".")[-2:]) for parameter in parameters))
    return [f"{_listed(counted)}: to adapt them, use target_parameters={names}"] if parameters else []


def _untraced(rows: Collection[Row]) -> list[str]:
    counted = _counted(dict.fromkeys(row.graph_reason for row in rows if row.graph_reason))
    return [f"{reason} ({count} times)" if count > 1 else reason for reason, count in counted.items()]


def _by_reason(skipped: Collection[SkippedLayer]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for layer in skipped:
        by_reason.setdefault(layer.reason, []).append(layer.path)
    lines = [f"{_listed(_counted(paths))}: {reason}" for reason, paths in by_reason.items()]
    if len(lines) <= _REASONS:
        return lines
    rest = sum(map(len, list(by_reason.values())[_REASONS:]))
    return [*lines[:_REASONS], f"{rest:,} more layers, for {len(lines) - _REASONS} other reasons"]


def _counted(texts: Collection[str]) -> dict[str, int]:
    """Count texts. Texts that differ only in the indices of layers are counted as one text with `*`."""
    same: dict[str, list[str]] = {}
    for text in texts:
        same.setdefault(starred(text), []).append(text)
    return {key if len(found) > 1 else found[0]: len(found) for key, found in same.items()}


def _listed(names: dict[str, int]) -> str:
    shown = [f"{name} ({count})" if count > 1 else name for name, count in names.items()]
    rest = sum(list(names.values())[_NAMES:])
    return ", ".join(shown[:_NAMES]) + f" and {rest:,} more" * (rest > 0)


def _not_orthogonal(rows: Collection[Row]) -> list[str]:
    wrong = [row for row in rows if row.orthogonality > _NOT_ORTHOGONAL]
    if not wrong:
        return []
    worst = max(wrong, key=lambda row: row.orthogonality)
    return [f"|Q'Q - I| is up to {worst.orthogonality:.0e}, at {worst.path} ({worst.adapter})"]
