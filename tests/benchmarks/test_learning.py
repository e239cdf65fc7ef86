"""HRA compared with other methods: tiny runs, the plan, statistics, and pages that follow from docs/results.json."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from learning.methods import layer_shapes, reflections
from learning.page import page
from learning.plan import RANKS, SEEDS, TASK_NAMES, Run, methods_of, missing
from learning.rates import chosen, final_runs, means, searched
from learning.records import FILE, Record, of, read, write
from learning.running import run_all
from learning.summary import compare, difference, gain, retained_at, retention_curve, scores, validation_gain
from learning.tasks import TASKS
from learning.tasks.language import config
from learning.tasks.task import Task
from learning.training import fit, run
from learning.variants import ALL
from torch import nn

#: Their runs have the same steps as those of the other tasks.
SLOW = ("language", "language-long", "language-4-bit", "newsgroups-5000", "digits")


@pytest.mark.parametrize(
    "task", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TASK_NAMES]
)
def test_a_tiny_run_of_each_task(task: str) -> None:
    record = run(task, "hra-pairs", 0, 1e-2, test=True, tiny=True)
    assert (record.task, record.method, record.seed, record.lr) == (task, "hra-pairs", 0, 1e-2)
    assert record.trainable > 0
    assert record.validation > 0 or TASKS[task].higher_is_better
    assert record.test is not None


@pytest.mark.parametrize("method", [method for method in ALL if method in methods_of("digits")])
def test_every_method_starts_at_the_base_model_and_moves(method: str) -> None:
    task = TASKS["teacher-rotation"](0, tiny=True)
    model = task.model()
    base, inputs = copy.deepcopy(model), task.inputs[:8]
    ALL[method].insert(model, task, 4)
    torch.testing.assert_close(model(inputs), base(inputs), atol=1e-5, rtol=1e-5)
    fit(model, nn.Module(), task, ALL[method], 1e-2)
    moved = not torch.allclose(model(inputs), base(inputs), atol=1e-4)
    assert moved is (method != "head"), "the task has no head, so only that one trains nothing"


def targets_and_shapes(task: type[Task]) -> list[tuple[int, int]]:
    if task.name.startswith("language"):
        with torch.device("meta"):
            return layer_shapes(transformers.AutoModelForCausalLM.from_config(config()), task.targets)
    return layer_shapes(task(0, tiny=True).model(), task.targets)


@pytest.mark.parametrize("task", [TASKS[name] for name in TASK_NAMES])
def test_lora_and_hra_have_as_many_parameters(task: type[Task]) -> None:
    shapes = targets_and_shapes(task)
    lora = task.lora_rank * sum(out + width for out, width in shapes)
    hra = reflections(shapes, task.lora_rank) * sum(width for _, width in shapes)
    assert abs(hra - lora) <= 0.03 * lora


@pytest.mark.parametrize("task", [pytest.param("digits", marks=pytest.mark.slow), "teacher-rotation"])
def test_a_seed_decides_everything(task: str) -> None:
    first, again = (run(task, "lora", 3, 1e-2, test=True, tiny=True) for _ in range(2))
    assert (again.validation, again.test, again.retention) == (first.validation, first.test, first.retention)


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "hra"])
def test_a_recorded_run_can_be_made_again(method: str) -> None:
    records = read()
    recorded = final_runs(records, "teacher-dense", method)
    again = run("teacher-dense", method, 0, chosen(records, "teacher-dense", method), test=True)
    assert again.trainable == recorded[0].trainable
    assert again.test is not None
    assert recorded[0].test is not None
    spread = statistics.stdev(record.test for record in recorded if record.test is not None)
    assert abs(again.test - recorded[0].test) <= spread


TASK = "teacher-dense"


@pytest.fixture(autouse=True)
def few_methods(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "docs" not in request.node.name:
        monkeypatch.setattr("learning.plan.STAGES", ((TASK, ("lora", "hra-pairs")),))


def record(planned: Run, validation: float, test: float = 1.0) -> Record:
    r = 4 if planned.r is None else planned.r
    return Record(
        planned.task, planned.method, r, planned.seed, planned.lr, 64, validation, test if planned.test else None, 0, 1
    )


def follow(score: Callable[[Run], float]) -> list[Record]:
    """Make all runs of a task, one at a time, with made-up scores."""
    records: list[Record] = []
    while planned := missing(records, [TASK]):
        records.append(record(planned[0], score(planned[0])))
        assert len(records) < 1000
    return records


def test_each_method_tests_five_seeds_at_the_best_rate() -> None:
    records = follow(lambda planned: abs(planned.lr - 3e-3) + planned.seed)
    assert chosen(records, TASK, "lora") == 3e-3
    runs = final_runs(records, TASK, "lora")
    assert [run.seed for run in runs] == list(SEEDS)
    assert {run.lr for run in runs} == {3e-3}
    grid = {run.lr for run in records if (run.method, run.test, run.r) == ("lora", None, 4)}
    assert grid == {3e-4, 1e-3, 1.7e-3, 3e-3, 5.5e-3, 1e-2}
    assert {run.r for run in records if run.method == "lora"} == set(RANKS[TASK]["lora"])


def test_the_mean_of_three_seeds_decides() -> None:
    records = follow(lambda planned: abs(planned.lr - (3e-3 if planned.seed == 0 else 1e-2)))
    assert chosen(records, TASK, "lora") == 1e-2
    assert [run.seed for run in final_runs(records, TASK, "lora")] == list(SEEDS)
    tried = {(run.lr, run.seed) for run in records if (run.method, run.r) == ("lora", 4)}
    assert {lr for lr, seed in tried if seed == 2} == {1.7e-3, 3e-3, 5.5e-3, 1e-2, 1.7e-2}


def test_a_grid_goes_on_where_its_edge_is_best() -> None:
    records = follow(lambda planned: abs(planned.lr - 5.5e-2))
    assert chosen(records, TASK, "lora") == 5.5e-2
    records = follow(lambda planned: planned.lr)
    assert chosen(records, TASK, "lora") == 1e-5, "six rates more, at most"


def test_a_long_run_reads_the_test_data_at_each_of_its_own_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "language-long"
    monkeypatch.setattr("learning.plan.STAGES", ((long, ("lora",)),))
    planned = missing([], [long])
    assert [(run.lr, run.seed, run.test) for run in planned] == [(1.7e-3, 0, True), (5.5e-3, 0, True)]
    records = [record(run, run.lr) for run in planned]
    assert not missing(records, [long])
    assert [run.lr for run in final_runs(records, long, "lora")] == [1.7e-3], "the smaller perplexity"


def make(planned: Run) -> Record:
    return record(planned, abs(planned.lr - 3e-3))


def test_runs_go_on_from_the_records_that_are_there(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    first = follow(lambda planned: make(planned).validation)
    write(first[:10], file)
    run_all([TASK], 2, file, make)
    assert read(file)[:10] == first[:10]
    assert sorted(map(str, read(file))) == sorted(map(str, first))


def killed_at_the_last_rate(planned: Run) -> Record:
    if planned.lr == 1e-2:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
    return make(planned)


def test_a_killed_process_ends_the_benchmark(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    benchmark = multiprocessing.get_context("fork").Process(
        target=run_all, args=([TASK], 1, file, killed_at_the_last_rate)
    )
    benchmark.start()
    benchmark.join(timeout=60)
    benchmark.kill()
    assert benchmark.exitcode == 1
    assert f"ended without a result: Run(task='{TASK}', method='lora', seed=0, lr=0.01" in capfd.readouterr().err
    assert [run.lr for run in read(file)] == [3e-4, 1e-3, 3e-3]


def test_differences_are_paired_by_seed() -> None:
    found = difference({0: 3.0, 1: 5.0, 2: 7.0, 9: 100.0}, {0: 1.0, 1: 4.0, 2: 4.0})
    error = statistics.stdev([2.0, 1.0, 3.0]) / 3**0.5
    assert found.mean == 2.0
    assert found.error == pytest.approx(error)
    assert found.half == pytest.approx(4.303 * error), "Student's t with two degrees of freedom"


def scored(made: dict[str, tuple[float, ...]]) -> list[Record]:
    """Runs with test scores, by method and seed."""
    return [
        record(Run(TASK, method, seed, 1e-3, None, test=test), 0.0, score)
        for method, scores in made.items()
        for seed, score in enumerate(scores)
        for test in (False, True)
    ]


def test_a_smaller_error_is_a_gain() -> None:
    records = scored({"lora": (4.9, 5.1), "hra-pairs": (3.0, 3.0)})
    assert gain(records, TASK, "hra-pairs", "lora").mean == pytest.approx(2.0)
    found = compare(records, TASK)
    assert found is not None
    assert (found.lora, found.other, found.holds) == ([4.9, 5.1], [3.0, 3.0], True)


def test_what_is_retained_between_two_rates() -> None:
    planned = [Run("digits", "lora", 0, lr, None, test=False) for lr in (1e-3, 3e-3, 1e-2)]
    scores = {1e-3: (70.0, 90.0), 3e-3: (80.0, 80.0), 1e-2: (60.0, 10.0)}
    records = [
        dataclasses.replace(record(one, scores[one.lr][0]), retention={"kept": scores[one.lr][1]}) for one in planned
    ]
    curve = retention_curve(records, "digits", "lora", "kept")
    assert curve == [scores[1e-3], scores[3e-3]], "up to the best rate"
    assert retained_at(curve, 77.5) == pytest.approx(82.5)
    assert retained_at(curve, 65.0) is None


def test_docs_results_md_follows_from_docs_results_json() -> None:
    text = FILE.with_suffix(".md").read_text()
    assert text == page(read()), "write it with: PYTHONPATH=benchmarks python -m learning --page"


ROOT = Path(__file__).resolve().parents[2]
GUIDE = " ".join((ROOT / "docs" / "training.md").read_text().split())
README = (ROOT / "README.md").read_text()
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
    assert len(lora) == len(pairs) == 5
    assert "is best after one or two passes (107 to 114) and ends at 252 to 315" in GUIDE
    assert all(min(curve) in curve[:2] for curve in lora)
    assert (min(map(min, lora)), max(map(min, lora))) == (107, 114)
    assert (min(c[-1] for c in lora), max(c[-1] for c in lora)) == (252, 315)
    assert "is best after two passes (99 to 104) and ends at 151 to 169" in GUIDE
    assert all(min(curve) == curve[1] for curve in pairs)
    assert (min(map(min, pairs)), max(map(min, pairs))) == (99, 104)
    assert (min(c[-1] for c in pairs), max(c[-1] for c in pairs)) == (151, 169)
    assert "LoRA at 103 and pairs at 102, and they end at 162 and 136" in GUIDE
    assert "In four passes at the rate of one pass, it is 359 with LoRA and 191 with HRA in pairs" in README
    scores = [
        [run.test for run in final_runs(records, "language-4-passes", method)] for method in ("lora", "hra-pairs")
    ]
    assert [round(statistics.mean(found)) for found in scores] == [359, 191]
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


def test_a_4_bit_base(records: list[Record]) -> None:
    assert "is 132 with LoRA and 138 in pairs, and the model completes 53% and 66% of the facts" in GUIDE
    runs = [final_runs(records, "language-4-bit", method) for method in ("lora", "hra-pairs")]
    assert [round(statistics.mean(scores(own))) for own in runs] == [132, 138]
    assert [round(statistics.mean(run.retention[FACTS] for run in own)) for own in runs] == [53, 66]


def test_schedule_warmup_and_weight_decay(records: list[Record]) -> None:
    said = {"cosine": "a linear one", "constant": "a constant rate", "no-warmup": "no warmup", "decay": "decay 0.1"}
    for name, words in said.items():
        found = validation_gain(records, "language", f"hra-pairs-{name}")
        assert f"{words} {found.mean:+.1f} ± {found.half:.1f}" in GUIDE
        assert abs(found.mean) < found.half, "no measurable difference"


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
