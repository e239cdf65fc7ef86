"""The file of results: one record for each run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "docs" / "results.json"


@dataclass(frozen=True)
class Record:
    """What one run gave.

    Args:
        task, method: names of the task and the method.
        r: the rank, or OFT's block size; 0 without an adapter.
        seed: draws the training examples, their order, and new weights.
        lr: the largest learning rate.
        trainable: trained parameters, without those of a new head.
        validation: the score on the validation split.
        test: the score on the test split, or None in runs that choose a learning rate or try a variant.
        seconds: CPU time of the steps on one thread.
        peak_mb: how far training raises the memory of the process, in MB; None where it cannot be measured.
        retention: what the model retains of what it could do, by name.
        curve: `[step, mean training loss since the point before, validation score]` during the training, for tasks
            that ask for it.
        commit: that of the code that made the run.
        dtype: that of products with the weights of the base model; empty for runs before it was stored.
        moved: see `training.moved`; None for runs before it was stored.
    """

    task: str
    method: str
    r: int
    seed: int
    lr: float
    trainable: int
    validation: float
    test: float | None
    seconds: float
    peak_mb: float | None
    retention: dict[str, float] = field(default_factory=dict)
    curve: list[list[float]] = field(default_factory=list)
    commit: str = ""
    dtype: str = ""
    moved: float | None = None


def read() -> list[Record]:
    """All records, in the order of the runs."""
    return [Record(**entry) for entry in json.loads(FILE.read_text())]


def write(records: Iterable[Record]) -> None:
    """Write records, one to a line, over the file at once."""
    lines = [json.dumps(dataclasses.asdict(entry)) for entry in records]
    new = FILE.with_suffix(".new")
    new.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    new.replace(FILE)


def of(records: Sequence[Record], task: str, method: str) -> list[Record]:
    """The records of a method on a task."""
    return [record for record in records if (record.task, record.method) == (task, method)]


def scaled_name(method: str, scale: float) -> str:
    """The name of a method whose trained model keeps a part of its change."""
    return f"{method}@{scale:g}"


def matched_rank(records: Sequence[Record], task: str, method: str) -> int | None:
    """The rank with as many parameters as LoRA: that of the first run."""
    return next((record.r for record in of(records, task, method)), None)
