"""What a run on a GPU has found so far, written after each part, so that a run that is cut off leaves its numbers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed.per_site import PerSite
from speed.results import Cell


@dataclass(frozen=True)
class Check:
    """A statement, and whether it holds.

    Attributes:
        group: what it belongs to.
        words: the statement.
        holds: `None` if it was not checked.
        detail: a number or a reason.
    """

    group: str
    words: str
    holds: bool | None
    detail: str

    @property
    def verdict(self) -> str:
        return "not checked" if self.holds is None else "yes" if self.holds else "**no**"


@dataclass(frozen=True)
class Ratio:
    """A time relative to another one of the same run.

    Attributes:
        group: what it belongs to.
        words: what is measured.
        value: the ratio.
    """

    group: str
    words: str
    value: float


@dataclass
class Report:
    """A run.

    Attributes:
        about: the machine, versions and date.
        checks: in the order in which they were made.
        cells: times and bytes, in the order in which they were measured.
        launches: what methods launch per site, by the unit that is counted.
        ratios: of host time and of graph mode.
        failures: parts that ended with an error, with the reason.
    """

    about: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    launches: dict[str, list[PerSite]] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
