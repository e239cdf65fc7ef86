"""The numbers of docs/training.md follow from docs/results.json."""

from __future__ import annotations

from pathlib import Path

import pytest
from learning.plan import TASK_NAMES
from learning.rates import searched
from learning.records import Record, read
from learning.summary import validation_gain

GUIDE = " ".join((Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text().split())
TEACHERS = [task for task in TASK_NAMES if task.startswith("teacher")]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return read()


def test_rates_of_hra_and_lora(records: list[Record]) -> None:
    assert "rates from 1e-3 to 1e-1 change the validation accuracy of HRA by less than 3 points" in GUIDE
    hra = searched(records, "newsgroups-1600", "hra")
    scores = [score for lr, score in hra.items() if 1e-3 <= lr <= 1e-1]
    assert len(scores) == 5
    assert 2 < max(scores) - min(scores) < 3
    assert "while LoRA falls to chance at 1e-2" in GUIDE
    assert searched(records, "newsgroups-1600", "lora")[1e-2] < 10, "20 classes"


def test_the_regularizer_on_the_teachers(records: list[Record]) -> None:
    assert "The orthogonality regularizer has no effect at a weight of 1e-4" in GUIDE
    gains = [validation_gain(records, task, "hra-reg-1e-4").mean for task in TEACHERS]
    assert max(map(abs, gains)) < 0.02
    assert "At 1e-2 it makes the errors on the teachers larger by up to 2 points" in GUIDE
    gains = [validation_gain(records, task, "hra-reg-1e-2").mean for task in TEACHERS]
    assert all(-2.05 < gain < -1.5 for gain in gains)
