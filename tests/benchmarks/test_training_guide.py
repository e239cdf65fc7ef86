"""The numbers of docs/training.md follow from docs/results.json."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from learning.rates import chosen, final_runs, means, searched
from learning.records import Record, of, read
from learning.summary import scores, validation_gain

GUIDE = " ".join((Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text().split())
FACTS, TALES = "facts, %", "perplexity of tales"


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return read()


def test_rates_of_lora_work_in_pairs(records: list[Record]) -> None:
    lora, pairs = (searched(records, "language", method) for method in ("lora", "hra-pairs"))
    assert "both are best at 5.5e-3 and worse at 1e-2" in GUIDE
    for method in ("lora", "hra-pairs"):
        found = means(records, "language", method)
        assert chosen(records, "language", method) == 5.5e-3
        assert found[1e-2] > 1.03 * found[5.5e-3]
    assert "At 1e-3 and 3e-3 their validation perplexities are within 1% of each other" in GUIDE
    assert all(abs(pairs[lr] / lora[lr] - 1) < 0.01 for lr in (1e-3, 3e-3))
    assert "from 1e-5 to 3e-4 that of pairs is 3 to 15% lower" in GUIDE
    lower = [round(100 * (1 - pairs[lr] / lora[lr])) for lr in (1e-5, 3e-5, 1e-4, 3e-4)]
    assert (min(lower), max(lower)) == (3, 15)


def test_a_classifier_hardly_depends_on_the_rate_in_pairs(records: list[Record]) -> None:
    assert "from 1e-3 to 3e-2 pairs classify between 74.6% and 75.8%" in GUIDE
    lora, pairs = (searched(records, "newsgroups-1600", method) for method in ("lora", "hra-pairs"))
    found = [round(score, 1) for lr, score in pairs.items() if 1e-3 <= lr <= 3e-2]
    assert (min(found), max(found)) == (74.6, 75.8) and len(found) >= 6
    assert "LoRA classifies 73.6% to 76.4% up to 5.5e-3, and 6.0% at 1e-2" in GUIDE
    found = [round(score, 1) for lr, score in lora.items() if 1e-3 <= lr <= 5.5e-3]
    assert (min(found), max(found), round(lora[1e-2], 1)) == (73.6, 76.4, 6.0)


def test_several_passes(records: list[Record]) -> None:
    def curves(method: str, lr: float) -> list[list[int]]:
        runs = [run for run in of(records, "language-4-passes", method) if run.lr == lr]
        return [[round(point[2]) for point in run.curve] for run in runs]

    lora, pairs = (curves(method, 5.5e-3) for method in ("lora", "hra-pairs"))
    assert len(lora) == len(pairs) == 4
    assert "is best after one or two passes (107 to 114) and ends at 252 to 315" in GUIDE
    assert all(min(curve) in curve[:2] for curve in lora)
    assert (min(map(min, lora)), max(map(min, lora))) == (107, 114)
    assert (min(c[-1] for c in lora), max(c[-1] for c in lora)) == (252, 315)
    assert "is best after two passes (99 to 102) and ends at 151 to 169" in GUIDE
    assert all(min(curve) == curve[1] for curve in pairs)
    assert (min(map(min, pairs)), max(map(min, pairs))) == (99, 102)
    assert (min(c[-1] for c in pairs), max(c[-1] for c in pairs)) == (151, 169)
    assert "LoRA at 103 and pairs at 102, and they end at 162 and 136" in GUIDE
    (lora_low,), (pairs_low,) = (curves(method, 1.7e-3) for method in ("lora", "hra-pairs"))
    assert (min(lora_low), lora_low[1], lora_low[-1]) == (103, 103, 162)
    assert (min(pairs_low), pairs_low[1], pairs_low[-1]) == (102, 102, 136)


def test_random_starts(records: list[Record]) -> None:
    assert "two runs of pairs with the same examples ended at validation perplexities of 104 and 133" in GUIDE
    runs = of(records, "language", "hra-pairs")
    repeated = [run.validation for run in runs if (run.lr, run.seed) == (1e-2, 0)]
    assert (round(min(repeated)), round(max(repeated))) == (104, 133)
    assert "at 5.5e-3, five seeds are between 104 and 108" in GUIDE
    by_seed = [run.validation for run in final_runs(records, "language", "hra-pairs")]
    assert len(by_seed) == 5 and min(by_seed) >= 104 and max(by_seed) <= 108


def test_gram_schmidt_cannot_turn_far(records: list[Record]) -> None:
    assert "It does not find the teacher that is rotated in four planes, which HRA finds exactly" in GUIDE
    errors = {method: searched(records, "teacher-rotation", method) for method in ("hra", "hra-gs")}
    assert min(errors["hra-gs"].values()) > 20
    assert min(errors["hra"].values()) < 0.01


def mean_test(records: list[Record], method: str) -> float:
    return statistics.mean(scores(final_runs(records, "language", method)))


def mean_kept(records: list[Record], method: str, name: str) -> float:
    return statistics.mean(run.retention[name] for run in final_runs(records, "language", method))


def test_the_perplexity_of_a_language_model(records: list[Record]) -> None:
    assert "HRA in pairs ends at a perplexity that is 3% higher than LoRA's" in GUIDE
    assert mean_test(records, "hra-pairs") / mean_test(records, "lora") == pytest.approx(1.03, abs=0.005)


def test_what_a_language_model_forgets(records: list[Record]) -> None:
    assert "rises from 51 to 69 with LoRA and to 65 in pairs, and the model still completes 50% and 58%" in GUIDE
    assert round(mean_kept(records, "base", TALES)) == 51
    assert [round(mean_kept(records, method, TALES)) for method in ("lora", "hra-pairs")] == [69, 65]
    assert [round(mean_kept(records, method, FACTS)) for method in ("lora", "hra-pairs")] == [50, 58]


def test_what_the_digits_forget(records: list[Record]) -> None:
    assert "On the digits, what remains varies more between seeds than between methods" in GUIDE
    kept = [
        [run.retention["accuracy on 0 to 4, %"] for run in final_runs(records, "digits", method)]
        for method in ("lora", "hra-pairs", "hra")
    ]
    between = max(map(statistics.mean, kept)) - min(map(statistics.mean, kept))
    assert between < min(max(values) - min(values) for values in kept)


def test_schedule_warmup_and_weight_decay(records: list[Record]) -> None:
    said = {"cosine": "a linear one", "constant": "a constant rate", "no-warmup": "no warmup", "decay": "decay 0.1"}
    for name, words in said.items():
        found = validation_gain(records, "language", f"hra-pairs-{name}")
        assert f"{words} {found.mean:+.1f} ± {found.half:.1f}" in GUIDE
        assert abs(found.mean) < found.half, "no measurable difference"
