"""The numbers of docs/training.md follow from docs/results.json."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from learning.plan import TASK_NAMES, finished
from learning.rates import searched
from learning.records import Record, final_runs, of, read
from learning.summary import gain, scores, validation_gain
from learning.variants import VARIANTS

GUIDE = " ".join((Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text().split())
REAL = ("newsgroups-1600", "digits")
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
    assert "The orthogonality regularizer has no effect on the teachers at a weight of 1e-4" in GUIDE
    gains = [validation_gain(records, task, "hra-reg-1e-4").mean for task in TEACHERS]
    assert max(map(abs, gains)) < 0.02
    assert "At 1e-2 it makes their errors larger by up to 2 points" in GUIDE
    gains = [validation_gain(records, task, "hra-reg-1e-2").mean for task in TEACHERS]
    assert all(-2.05 < gain < -1.5 for gain in gains)


FACTS, TALES, DIGITS = "facts, %", "perplexity of tales", "accuracy on 0 to 4, %"


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
    assert "HRA ends at a perplexity that is 13% higher than LoRA's" in GUIDE
    hra, lora = (statistics.mean(scores(final_runs(records, "language", method))) for method in ("hra", "lora"))
    assert hra / lora == pytest.approx(1.13, abs=0.005)


def test_what_a_language_model_forgets(records: list[Record]) -> None:
    assert (
        "rises on SmolLM2 from 51 to 60 with both methods; HRA still completes 77% of the facts and LoRA 50%" in GUIDE
    )
    for method, percent in (("hra", 77), ("lora", 50)):
        runs = final_runs(records, "language", method)
        assert round(statistics.mean(run.retention[FACTS] for run in runs)) == percent
        assert round(statistics.mean(run.retention[TALES] for run in runs)) == 60
    assert round(final_runs(records, "language", "base")[0].retention[TALES]) == 51
    assert "LoRA at a rate of 1e-3 reaches about the same perplexity on the new task as HRA, and completes 87%" in GUIDE
    low = one(records, "lora", 1e-3)
    assert low.validation / one(records, "hra", 3e-3).validation == pytest.approx(1, abs=0.06)
    assert round(low.retention[FACTS]) == 87


def test_what_the_digits_forget(records: list[Record]) -> None:
    assert "varies more between seeds (48 to 87% with LoRA) than between methods" in GUIDE
    kept = {m: [run.retention[DIGITS] for run in final_runs(records, "digits", m)] for m in ("lora", "hra", "full")}
    assert (round(min(kept["lora"])), round(max(kept["lora"]))) == (48, 87)
    assert "full fine-tuning has the lowest mean, 55%" in GUIDE
    means = {method: statistics.mean(values) for method, values in kept.items()}
    assert min(means, key=lambda method: means[method]) == "full"
    assert round(means["full"]) == 55
    assert max(means.values()) - min(means.values()) < max(kept["lora"]) - min(kept["lora"])


def test_starts_from_gradients(records: list[Record]) -> None:
    assert "make two errors smaller by 0.2 and 0.4 points" in GUIDE
    gains = [validation_gain(records, task, "hra-gradient").mean for task in TEACHERS[1:]]
    assert [round(gain, 1) for gain in gains] == [0.2, 0.4]
    told = "the perplexity of the new task is 115 (HRA: 122), that of the tales 84 (64), and 54% of the facts remain"
    assert f"{told} (85%)" in GUIDE
    runs = one(records, "hra-gradient", 1e-3), one(records, "hra", 3e-3)
    assert [round(run.validation) for run in runs] == [115, 122]
    assert [round(run.retention[TALES]) for run in runs] == [84, 64]
    assert [round(run.retention[FACTS]) for run in runs] == [54, 85]


def test_gram_schmidt(records: list[Record]) -> None:
    assert "it scores as HRA without it (-0.4 ± 1.1 points)" in GUIDE
    found = gain(records, "digits", "hra-gs", "hra")
    assert (round(found.mean, 1), round(found.half, 2)) == (-0.4, 1.15)
    assert "its error is 3.5 to 24 points larger" in GUIDE
    lost = sorted(-gain(records, task, "hra-gs", "hra").mean for task in TEACHERS)
    assert (round(lost[0], 1), round(lost[-1])) == (3.5, 24)


def test_variants_on_real_data(records: list[Record]) -> None:
    assert "On MiniLM (two variants) and the digits (ten), no gain is larger than its 95% interval" in GUIDE
    found = [
        (task, validation_gain(records, task, name))
        for task in REAL
        for name in VARIANTS
        if finished(records, task, name)
    ]
    assert [task for task, _ in found].count("newsgroups-1600") == 2
    assert [task for task, _ in found].count("digits") == 10
    assert all(abs(value.mean) <= value.half for _, value in found)
    assert "which is 1.6 to 8 points wide on each side" in GUIDE
    halves = [value.half for _, value in found]
    assert (round(min(halves), 1), round(max(halves))) == (1.6, 8)


def test_variants_on_the_teachers(records: list[Record]) -> None:
    assert "make the errors larger by 3 to 23 points" in GUIDE
    lost = sorted(-validation_gain(records, task, "hra-independent").mean for task in TEACHERS)
    assert (round(lost[0]), round(lost[-1])) == (3, 23)
    assert "make two of the three errors smaller by up to 0.6 points" in GUIDE
    names = ("hra-unit-kept", "hra-renorm", "hra-decay", "hra-decay-1")
    gains = [validation_gain(records, task, name).mean for task in TEACHERS[1:] for name in names]
    assert min(gains) > 0
    assert round(max(gains), 1) == 0.6
    for task in TEACHERS[1:]:
        decay = validation_gain(records, task, "hra-decay-1")
        assert decay.mean > decay.half


def test_the_distance_to_full_fine_tuning(records: list[Record]) -> None:
    assert (
        "by 0.5 ± 0.5 points on MiniLM and 2.4 ± 3.4 on the digits, where HRA covers 19% of the mean distance" in GUIDE
    )
    for task, mean, half in (("newsgroups-1600", 0.5, 0.5), ("digits", 2.4, 3.4)):
        distance = gain(records, task, "full", "lora")
        assert (round(distance.mean, 1), round(distance.half, 1)) == (mean, half)
    assert round(100 * gain(records, "digits", "hra", "lora").mean / gain(records, "digits", "full", "lora").mean) == 19
