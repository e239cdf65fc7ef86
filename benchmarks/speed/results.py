"""All numbers of a run, with what they were measured on, as JSON and back."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed.ratios import Ratio, ratio
from speed.setting import Setting
from speed.timing import Measured


@dataclass
class Cell:
    """A setting, and what was measured in it."""

    setting: Setting
    measured: Measured

    def ratio(self, own: str, peer: str) -> Ratio | None:
        """Of two methods; `None` where one was not measured."""
        values = self.measured.values
        return ratio(values[own], values[peer]) if own in values and peer in values else None


@dataclass
class Results:
    """A run.

    Attributes:
        about: the machine, versions, date, and which run it was.
        cells: in the order in which they were measured.
    """

    about: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def load(file: Path) -> Results:
    """What `save` wrote."""
    read = json.loads(file.read_text())
    cells = [Cell(Setting(**cell["setting"]), Measured(**cell["measured"])) for cell in read["cells"]]
    return Results(read["about"], cells)
