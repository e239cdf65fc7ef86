"""The performance targets and their measurements, as text and as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from speed.labels import described
from speed.methods import ALL
from speed.ratios import Ratio
from speed.targets import Finding, Target


def as_text(found: Sequence[Finding]) -> str:
    """Two lines per target, and how many are met."""
    rows, width = list[str](), max((len(finding.verdict) for finding in found), default=0)
    for finding in found:
        rows.append(f"{finding.verdict:<{width}} {words(finding.target)}")
        rows.append(f"{'':<{width}} {', '.join(measured(finding.ratio))} pairs; limit {finding.limit:.3f}")
    return "\n".join([*rows, "", f"{count_met(found)} targets are met."])


def as_table(found: Sequence[Finding]) -> Iterator[str]:
    """A Markdown table. Targets that are not met are bold."""
    yield "| target | limit | measured | interval | pairs | result |"
    yield "|---|--:|--:|--:|--:|---|"
    for finding in found:
        verdict = finding.verdict if finding.met else f"**{finding.verdict}**"
        cells = [words(finding.target), f"{finding.limit:.3f}", *measured(finding.ratio), verdict]
        yield f"| {' | '.join(cells)} |"


def count_met(found: Sequence[Finding]) -> str:
    """As in `8 of 22`."""
    return f"{sum(finding.met for finding in found)} of {len(found)}"


def words(target: Target) -> str:
    """A description of a target."""
    return f"{described(target.setting)}: {ALL[target.own].title} / {ALL[target.peer].title}"


def measured(ratio: Ratio | None) -> tuple[str, str, str]:
    """A ratio, its interval, and how many pairs.

    >>> measured(Ratio(median=0.987, low=0.981, high=0.993, rounds=7))
    ('0.987', '0.981 to 0.993', '7')
    """
    if ratio is None:
        return "-", "-", "0"
    interval = f"{ratio.low:.3f} to {ratio.high:.3f}" if ratio.rounds > 1 else "-"
    return f"{ratio.median:.3f}", interval, str(ratio.rounds)
