"""What the zoo found out about one model, and about all of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

#: The checks, in the order in which they are made.
CHECKS = ("transform", "start", "eval", "train", "gradients", "sizes", "deepcopy", "state_dict", "trace", "fold")
OK = "ok"
#: How the text of a check begins that does not apply, and of one that ended in a refusal without any change.
NOT_APPLICABLE, REFUSED = "not applicable", "refused: "
#: How `transform(trace=True)` makes a graph.
BY_FX, BY_EXPORT = "torch.fx", "torch.export"


@dataclass
class Result:
    """One model's record.

    Attributes:
        name: `"<library>/<model>"`.
        matched: adapted layers.
        traced: `BY_FX`, `BY_EXPORT`, or `REFUSED` with the reason.
        refused: layer -> why `transform` refused it.
        checks: name -> `OK`, "not applicable: ...", "refused: ..." or what went wrong.
        dtype: in which the model was run.
    """

    name: str
    matched: int = 0
    traced: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    dtype: str = ""

    @property
    def failures(self) -> dict[str, str]:
        """The checks that went wrong."""
        fine = (OK, NOT_APPLICABLE, REFUSED)
        return {name: text for name, text in self.checks.items() if not text.startswith(fine)}

    def line(self) -> str:
        """One line for a terminal, and one for each trouble."""
        refused = f", {len(self.refused)} refused" if self.refused else ""
        graph = "no graph" if self.traced.startswith(REFUSED) else self.traced
        head = f"{'WRONG' if self.failures else 'ok   '} {self.name}: {self.matched} layers{refused}, {graph}"
        troubles = [f"{name}: {what}" for name, what in self.failures.items()]
        return "\n      ".join([head, *troubles])


def summary(results: Sequence[Result]) -> Iterator[str]:
    """A Markdown table with a row for each library, and the reasons of refusals with the number of models."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.name.partition("/")[0]].append(result)
    yield "| | models | wrong | graph by torch.fx | by torch.export | layers | refused layers |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for name, rows in (*groups.items(), ("all", results)):
        numbers = (
            len(rows),
            sum(bool(row.failures) for row in rows),
            sum(row.traced == BY_FX for row in rows),
            sum(row.traced == BY_EXPORT for row in rows),
            sum(row.matched for row in rows),
            sum(len(row.refused) for row in rows),
        )
        yield f"| {name} | {' | '.join(map(str, numbers))} |"
    yield ""
    reasons = Counter(reason for row in results for reason in {*row.refused.values()})
    yield from (f"{count} models: {reason}" for reason, count in reasons.most_common())
