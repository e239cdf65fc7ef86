"""Launches per adapted layer as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from speed.methods import METHODS
from speed.per_site import PerSite


def table(title: str, columns: Mapping[str, PerSite]) -> Iterator[str]:
    """A row for each method, and in parentheses how many times the launches of LoRA.

    Args:
        title: of the table.
        columns: by their heads.
    """
    yield from (f"### {title}", "")
    yield f"| | {' | '.join(columns)} |"
    yield f"|---|{'--:|' * len(columns)}"
    for key in METHODS:
        if any(key in column.launches for column in columns.values()):
            yield f"| {METHODS[key].title} | {' | '.join(_cell(column, key) for column in columns.values())} |"
    yield f"| a whole step of the frozen base | {' | '.join(str(column.base) for column in columns.values())} |"
    yield ""
    for head, column in columns.items():
        yield from (f"Left out ({head}): {name}, {why}\n" for name, why in column.left_out.items())


def _cell(one: PerSite, key: str) -> str:
    total, peer = one.total(key), one.total("lora")
    if total is None:
        return "-"
    return f"{total:.2f}" + (f" ({total / peer:.2f})" if peer and key != "lora" else "")
