"""The lines that must hold, as text and as a table, with what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from speed.lines import MOST_NOISE, TITLES, Finding
from speed.ratios import Ratio
from speed.wording import share

FLOOR = """\
The floor is the ratio of the frozen base, which has no adapter at all, to the same peer in the same rounds; it is in
bold where the limit lies below it, and missing where the base is the peer or took no part.
"""


def as_text(found: Sequence[Finding]) -> str:
    """One line each, and how many are met."""
    rows, width = list[str](), max((len(finding.verdict) for finding in found), default=0)
    for group, title in TITLES.items():
        rows.append(f"\n{group}. {title}")
        for finding in found:
            if finding.line.group == group:
                rows.append(f"  {finding.verdict:<{width}} {finding.line.words}")
                numbers = f"{measured(finding.ratio)}, {pairs(finding)} pairs; limit {limit(finding)}"
                rows.append(f"  {'':<{width}} {numbers}; floor {measured(finding.floor)}")
    rows += ["", *noises(found)]
    met = sum(finding.met for finding in found)
    return "\n".join([*rows, "", f"{met} of {len(found)} lines are met."])


def as_table(found: Sequence[Finding]) -> Iterator[str]:
    """In Markdown; what is not met is in bold."""
    yield "| line | measured (interval) | pairs | limit | floor: base / peer | |"
    yield "|---|--:|--:|--:|--:|---|"
    for finding in found:
        verdict = finding.verdict if finding.met else f"**{finding.verdict}**"
        words = f"{finding.line.group}. {finding.line.words}"
        floor = f"**{measured(finding.floor)}**" if finding.below_floor else measured(finding.floor)
        yield f"| {words} | {measured(finding.ratio)} | {pairs(finding)} | {limit(finding)} | {floor} | {verdict} |"


def noises(found: Sequence[Finding]) -> Iterator[str]:
    """How far two of a kind were apart, where that was measured."""
    for finding in found:
        if finding.line.control and finding.ratio:
            where = f"{finding.line.setting.size} tokens, {finding.line.setting.mode}"
            yield f"Noise between two copies of the base ({where}): {finding.noise:.1%}."


def pairs(finding: Finding) -> int:
    return finding.ratio.rounds if finding.ratio else 0


def measured(ratio: Ratio | None) -> str:
    """A ratio with its interval, as in `0.987 (0.981 to 0.993)`."""
    if ratio is None:
        return "-"
    interval = f" ({share(ratio.low)} to {share(ratio.high)})" if ratio.rounds > 1 else ""
    return share(ratio.median) + interval


def limit(finding: Finding) -> str:
    """The most that it may be, and the noise that is added."""
    text = f"{finding.line.limit:.2f}" if finding.line.limit >= 0.01 else f"{finding.line.limit:g}"
    return f"{text} + noise {min(finding.noise, MOST_NOISE):.1%}" if finding.line.control else text
