"""The performance targets and their measurements, as text and as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from speed.formatting import share
from speed.ratios import Ratio
from speed.targets import MOST_NOISE, TITLES, Finding

FLOOR = """\
The floor is the ratio of the frozen base model, which has no adapter, to the same peer in the same rounds. It is bold
if it is above the limit, and missing if the base model is the peer or was not measured.
"""


def as_text(found: Sequence[Finding]) -> str:
    """One entry per target, and how many are met."""
    rows, width = list[str](), max((len(finding.verdict) for finding in found), default=0)
    for group, title in TITLES.items():
        rows.append(f"\n{group}. {title}")
        for finding in found:
            if finding.target.group == group:
                rows.append(f"  {finding.verdict:<{width}} {finding.target.words}")
                numbers = f"{measured(finding.ratio)}, {pairs(finding)} pairs; limit {limit(finding)}"
                rows.append(f"  {'':<{width}} {numbers}; floor {measured(finding.floor)}")
    rows += ["", *noises(found)]
    met = sum(finding.met for finding in found)
    return "\n".join([*rows, "", f"{met} of {len(found)} targets are met."])


def as_table(found: Sequence[Finding]) -> Iterator[str]:
    """A Markdown table. Targets that are not met are bold."""
    yield "| target | measured (interval) | pairs | limit | floor: base / peer | |"
    yield "|---|--:|--:|--:|--:|---|"
    for finding in found:
        verdict = finding.verdict if finding.met else f"**{finding.verdict}**"
        words = f"{finding.target.group}. {finding.target.words}"
        floor = f"**{measured(finding.floor)}**" if finding.below_floor else measured(finding.floor)
        yield f"| {words} | {measured(finding.ratio)} | {pairs(finding)} | {limit(finding)} | {floor} | {verdict} |"


def noises(found: Sequence[Finding]) -> Iterator[str]:
    """The noise between two copies of a method, if it was measured."""
    for finding in found:
        if finding.target.control and finding.ratio:
            where = f"{finding.target.setting.size} tokens, {finding.target.setting.mode}"
            yield f"Noise between two copies of the base model ({where}): {finding.noise:.1%}."


def pairs(finding: Finding) -> int:
    return finding.ratio.rounds if finding.ratio else 0


def measured(ratio: Ratio | None) -> str:
    """A ratio with its interval, as in `0.987 (0.981 to 0.993)`."""
    if ratio is None:
        return "-"
    interval = f" ({share(ratio.low)} to {share(ratio.high)})" if ratio.rounds > 1 else ""
    return share(ratio.median) + interval


def limit(finding: Finding) -> str:
    """The limit, and the noise that is added to it."""
    text = f"{finding.target.limit:.2f}" if finding.target.limit >= 0.01 else f"{finding.target.limit:g}"
    return f"{text} + noise {min(finding.noise, MOST_NOISE):.1%}" if finding.target.control else text
