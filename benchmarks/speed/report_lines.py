"""The lines that must hold, as text and as a table, with what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from speed.lines import MOST_NOISE, TITLES, Finding
from speed.wording import share


def as_text(found: Sequence[Finding]) -> str:
    """One line each, and how many are met."""
    rows = list[str]()
    for group, title in TITLES.items():
        rows.append(f"\n{group}. {title}")
        for finding in found:
            if finding.line.group == group:
                rows.append(f"  {finding.verdict:<15} {finding.line.words}")
                rows.append(f"  {'':<15} {measured(finding)}, {pairs(finding)} pairs; limit {limit(finding)}")
    rows += ["", *noises(found)]
    met = sum(finding.met for finding in found)
    return "\n".join([*rows, "", f"{met} of {len(found)} lines are met."])


def as_table(found: Sequence[Finding]) -> Iterator[str]:
    """In Markdown; what is not met is in bold."""
    yield "| line | measured (interval) | pairs | limit | |"
    yield "|---|--:|--:|--:|---|"
    for finding in found:
        verdict = finding.verdict if finding.met else f"**{finding.verdict}**"
        words = f"{finding.line.group}. {finding.line.words}"
        yield f"| {words} | {measured(finding)} | {pairs(finding)} | {limit(finding)} | {verdict} |"


def noises(found: Sequence[Finding]) -> Iterator[str]:
    """How far two of a kind were apart, where that was measured."""
    for finding in found:
        if finding.line.control and finding.ratio:
            where = f"{finding.line.setting.size} tokens, {finding.line.setting.mode}"
            yield f"Noise between two copies of the base ({where}): {finding.noise:.1%}."


def pairs(finding: Finding) -> int:
    return finding.ratio.rounds if finding.ratio else 0


def measured(finding: Finding) -> str:
    """The ratio with its interval, as in `0.987 (0.981 to 0.993)`."""
    if finding.ratio is None:
        return "-"
    ratio = finding.ratio
    interval = f" ({share(ratio.low)} to {share(ratio.high)})" if ratio.rounds > 1 else ""
    return share(ratio.median) + interval


def limit(finding: Finding) -> str:
    """The most that it may be, and the noise that is added."""
    text = f"{finding.line.limit:.2f}" if finding.line.limit >= 0.01 else f"{finding.line.limit:g}"
    return f"{text} + noise {min(finding.noise, MOST_NOISE):.1%}" if finding.line.control else text
