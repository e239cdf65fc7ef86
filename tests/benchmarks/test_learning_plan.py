"""The plan of the learning benchmark: how rates are chosen, what comes next, statistics, and the page."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from learning.page import page
from learning.plan import RANKS, SEEDS, Run, missing
from learning.rates import chosen, final_runs
from learning.records import FILE, Record, read, write
from learning.running import run_all
from learning.summary import compare, difference, gain, retained_at, retention_curve

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
