"""The numbers of docs/training.md follow from docs/results.json."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from learning.plan import TASK_NAMES
from learning.rates import searched
from learning.records import Record, final_runs, of, read
from learning.summary import scores, validation_gain

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


FACTS = "facts, %"


def one(records: list[Record], method: str, lr: float) -> Record:
    """The run of seed 0 on SmolLM2 that was part of the search for a learning rate."""
    return next(run for run in of(records, "language", method) if (run.seed, run.lr, run.test) == (0, lr, None))


def test_rates_of_a_language_model(records: list[Record]) -> None:
    assert "HRA is best at 3e-3 and diverges at 1e-1, and LoRA is about as good at 1e-2 as at 3e-3" in GUIDE
    hra, lora = (searched(records, "language", method) for method in ("hra", "lora"))
    assert min(hra, key=lambda lr: hra[lr]) == 3e-3
    assert hra[1e-1] > 1000
    assert abs(lora[1e-2] / lora[3e-3] - 1) < 0.01


def test_perplexity_of_a_language_model(records: list[Record]) -> None:
    assert "HRA ends at a perplexity that is 13 % higher than LoRA's" in GUIDE
    hra, lora = (statistics.mean(scores(final_runs(records, "language", method))) for method in ("hra", "lora"))
    assert hra / lora == pytest.approx(1.13, abs=0.005)


def test_what_a_language_model_forgets(records: list[Record]) -> None:
    assert "completes 77 % of the facts after HRA and 50 % after LoRA" in GUIDE
    for method, percent in (("hra", 77), ("lora", 50)):
        kept = statistics.mean(run.retention[FACTS] for run in final_runs(records, "language", method))
        assert round(kept) == percent
    assert (
        "LoRA at a rate of 1e-3 reaches about the same perplexity on the new task as HRA, and completes 87 %" in GUIDE
    )
    low = one(records, "lora", 1e-3)
    assert low.validation / one(records, "hra", 3e-3).validation == pytest.approx(1, abs=0.06)
    assert round(low.retention[FACTS]) == 87


def test_starts_from_gradients(records: list[Record]) -> None:
    assert "perplexity of 115 in place of 120, and complete 54 % of the known facts in place of 77 %" in GUIDE
    started, usual = one(records, "hra-gradient", 1e-3), final_runs(records, "language", "hra")[0]
    assert (round(started.validation), round(usual.validation)) == (115, 120)
    assert (round(started.retention[FACTS]), round(usual.retention[FACTS])) == (54, 77)
