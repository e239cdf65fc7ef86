"""HRA compared with other methods: tiny runs, the plan, statistics, and pages that follow from docs/results.json."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from learning import comparison, costs, forgiving
from learning.directions import lora_layers, main_inputs, protect_lora, top
from learning.methods import layer_shapes, reflections
from learning.page import page
from learning.plan import RANKS, SEEDS, TASK_NAMES, Run, methods_of, missing
from learning.rates import chosen, final_runs, means, searched
from learning.records import FILE, Record, read, write
from learning.running import run_all
from learning.summary import difference
from learning.tasks import TASKS
from learning.tasks.language import config
from learning.tasks.task import Task
from learning.training import count, fit, run
from learning.variants import ALL, BASE_OF
from torch import nn

TASK = "teacher-dense"
#: Their runs have the same steps as those of the other tasks.
ALIKE = ("language", "language-long", "language-4-bit", "newsgroups-5000", "digits")


def marked(names: Iterable[str]) -> list[Any]:
    """Tasks; for those of SmolLM2, even its configuration takes ten seconds to read."""
    return [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("language")) for name in names]


@pytest.mark.parametrize("task", marked(name for name in TASK_NAMES if name not in ALIKE))
def test_a_tiny_run_of_each_task(task: str) -> None:
    record = run(task, "hra-pairs", 0, 1e-2, test=True, tiny=True)
    assert (record.task, record.method, record.seed, record.lr) == (task, "hra-pairs", 0, 1e-2)
    assert record.trainable > 0
    assert record.validation > 0 or TASKS[task].higher_is_better
    assert record.test is not None


@pytest.mark.parametrize("method", sorted({*methods_of("digits"), *methods_of(TASK)} - BASE_OF.keys()))
def test_every_method_starts_at_the_base_model_and_moves(method: str) -> None:
    task = TASKS["teacher-rotation"](0, tiny=True)
    model = task.model()
    base, inputs = copy.deepcopy(model), task.inputs[:8]
    ALL[method].insert(model, task, 4)
    torch.testing.assert_close(model(inputs), base(inputs), atol=1e-5, rtol=1e-5)
    fit(model, nn.Module(), task, ALL[method], 1e-2)
    moved = not torch.allclose(model(inputs), base(inputs), atol=1e-4)
    assert moved is (method != "head"), "the task has no head, so only that one trains nothing"


def test_protected_lora_does_not_read_the_main_directions_of_inputs() -> None:
    task = TASKS["teacher-rotation"](0, tiny=True)
    model = task.model()
    ALL["lora"].insert(model, task, 4)
    inputs = torch.randn(200, 3) @ torch.randn(3, 64)
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    bases = main_inputs(model, layers, inputs.split(50), top(3))

    def protect(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        protect_lora(optimizer, model, bases)

    fit(model, nn.Module(), task, replace(ALL["lora"], prepare_optimizer=protect), 1e-2)
    torch.testing.assert_close(first(inputs), first.base_layer(inputs), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first(task.inputs[:8]), first.base_layer(task.inputs[:8]), atol=1e-3)


def targets_and_shapes(task: type[Task]) -> list[tuple[int, int]]:
    if task.name.startswith("language"):
        with torch.device("meta"):
            return layer_shapes(transformers.AutoModelForCausalLM.from_config(config()), task.targets)
    return layer_shapes(task(0, tiny=True).model(), task.targets)


@pytest.mark.parametrize("name", marked(TASK_NAMES))
def test_lora_and_hra_have_as_many_parameters(name: str) -> None:
    task = TASKS[name]
    shapes = targets_and_shapes(task)
    lora = task.lora_rank * sum(out + width for out, width in shapes)
    hra = reflections(shapes, task.lora_rank) * sum(width for _, width in shapes)
    assert abs(hra - lora) <= 0.03 * lora


@pytest.mark.parametrize("method", ["oft", "boft", "psoft", "miss"])
def test_methods_of_peft_have_about_as_many_parameters_as_lora(method: str) -> None:
    task = TASKS[TASK](0, tiny=True)
    lora, other = task.model(), task.model()
    for name, model in (("lora", lora), (method, other)):
        ALL[name].insert(model, task, ALL[name].rank(layer_shapes(model, task.targets), task.lora_rank))
    assert abs(count(other) - count(lora)) <= 0.13 * count(lora)


def test_costs_are_those_of_steps_in_turns() -> None:
    found = costs.measure(TASK, ("lora", "hra-pairs", "full"), rounds=2)
    assert all(len(cost.seconds) == len(cost.lora) == 2 for cost in found.values())
    assert [cost.trainable for cost in found.values()] == [2 * 4 * 128, 2 * 8 * 64, 2 * 65 * 64]
    assert found["full"].file_mb == round(4 * 2 * 65 * 64 / 1e6, 2)


def test_no_method_beats_those_on_the_line_of_the_plot() -> None:
    points = [(3.0, 9.0), (1.0, 5.0), (2.0, 4.0), (2.0, 7.0), (3.0, 8.0), (4.0, 9.0)]
    assert list(comparison.front(points, up=True)) == [(1.0, 5.0), (2.0, 7.0), (3.0, 9.0)]
    assert list(comparison.front(points, up=False)) == [(1.0, 5.0), (2.0, 4.0)]


def test_a_seed_decides_everything() -> None:
    first, again = (run("teacher-rotation", "lora", 3, 1e-2, test=True, tiny=True) for _ in range(2))
    assert (again.validation, again.test, again.retention) == (first.validation, first.test, first.retention)


def test_a_recorded_run_can_be_made_again() -> None:
    records = read()
    recorded = final_runs(records, "teacher-dense", "hra")
    again = run("teacher-dense", "hra", 0, chosen(records, "teacher-dense", "hra"), test=True)
    assert again.trainable == recorded[0].trainable
    assert again.test is not None
    assert recorded[0].test is not None
    spread = statistics.stdev(record.test for record in recorded if record.test is not None)
    assert abs(again.test - recorded[0].test) <= spread


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


def test_a_grid_goes_on_where_its_edge_is_best() -> None:
    records = follow(lambda planned: abs(planned.lr - 5.5e-2))
    assert chosen(records, TASK, "lora") == 5.5e-2
    records = follow(lambda planned: planned.lr)
    assert chosen(records, TASK, "lora") == 1e-5, "six rates more, at most"


def make(planned: Run) -> Record:
    return record(planned, abs(planned.lr - 3e-3))


def test_runs_go_on_from_the_records_that_are_there(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    first = follow(lambda planned: make(planned).validation)
    write(first[:10], file)
    run_all([TASK], 2, file, make)
    assert read(file)[:10] == first[:10]
    assert sorted(map(str, read(file))) == sorted(map(str, first))


def test_differences_are_paired_by_seed() -> None:
    found = difference({0: 3.0, 1: 5.0, 2: 7.0, 9: 100.0}, {0: 1.0, 1: 4.0, 2: 4.0})
    error = statistics.stdev([2.0, 1.0, 3.0]) / 3**0.5
    assert found.mean == 2.0
    assert found.error == pytest.approx(error)
    assert found.half == pytest.approx(4.303 * error), "Student's t with two degrees of freedom"


def test_docs_results_md_follows_from_docs_results_json() -> None:
    text = FILE.with_suffix(".md").read_text()
    assert text == page(read()), "write it with: PYTHONPATH=benchmarks python -m learning --page"


ROOT = Path(__file__).resolve().parents[2]
GUIDE = " ".join((ROOT / "docs" / "training.md").read_text().split())
TWO = ("lora", "hra-pairs")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return read()


def test_what_the_guide_says_of_rates(records: list[Record]) -> None:
    assert [chosen(records, "language", method) for method in TWO] == [5.5e-3, 1e-2]
    found = means(records, "language", "hra-pairs")
    assert "LoRA is best at 5.5e-3, and pairs are equally good at 5.5e-3 and 1e-2" in GUIDE
    assert f"(validation perplexities of {found[5.5e-3]:.1f} and {found[1e-2]:.1f}, means of three seeds)" in GUIDE
    lora, pairs = (searched(records, "language", method) for method in TWO)
    assert "From 1e-3 to 5.5e-3, the validation perplexity of pairs is within 3% of LoRA's" in GUIDE
    assert all(abs(pairs[lr] / lora[lr] - 1) < 0.03 for lr in (1e-3, 3e-3, 5.5e-3))
    assert f"At 3e-2, pairs end at {pairs[3e-2]:.0f}, and LoRA diverges" in GUIDE
    assert lora[3e-2] > 1000


def test_what_a_wrong_rate_costs() -> None:
    digits = {1e-4: 0.9, 3e-4: 0.5, 1e-3: 0.2, 3e-3: 0.0, 1e-2: 0.1, 3e-2: 1.0, 1e-1: 1.0}
    language = dict(zip(digits, (0.8, 0.4, 0.0, 0.3, 0.6, 1.0, 1.0), strict=True))
    other, above, below, whole = forgiving.summary({"digits": digits, "language": language})
    assert other == pytest.approx((0.2 + 0.3) / 2)
    assert above == pytest.approx((0.1 + 0.3) / 2)
    assert below == pytest.approx((0.2 + 0.4) / 2)
    assert whole == pytest.approx((sum(digits.values()) + sum(language.values())) / 14)


def test_the_lost_part_is_a_share_of_what_training_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forgiving.PLAN, "digits", (range(1), ("lora",)))
    at = dict(zip(forgiving.RATES, (70.0, 75.0, 80.0, 85.0, 90.0, 65.0, 20.0), strict=True))
    records = [Record("digits", "lora", 4, 0, lr, 64, score, None, 0, 1) for lr, score in at.items()]
    records.append(Record("digits", "head", 0, 0, 1e-3, 64, 70.0, 70.0, 0, 1))
    monkeypatch.setattr("learning.forgiving.untrained", lambda task: "head")
    monkeypatch.setattr("learning.rates.chosen", lambda *_: 1e-3)
    parts = forgiving.lost(records, "digits", "lora").values()
    assert [round(part, 2) for part in parts] == [1, 0.75, 0.5, 0.25, 0, 1, 1]
