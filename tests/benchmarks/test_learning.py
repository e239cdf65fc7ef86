"""HRA compared with other methods: tiny runs, the plan, statistics, and pages that follow from docs/results.json."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable
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
from learning.summary import difference, scores, validation_gain
from learning.tasks import TASKS
from learning.tasks.language import config
from learning.tasks.task import Task
from learning.training import fit, run
from learning.variants import ALL
from torch import nn

#: Their runs have the same steps as those of the other tasks.
ALIKE = ("language", "language-long", "language-4-bit", "newsgroups-5000", "digits")


@pytest.mark.parametrize("task", [name for name in TASK_NAMES if name not in ALIKE])
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
README = (ROOT / "README.md").read_text()
FACTS, TALES = "facts, %", "perplexity of tales"
TWO = ("lora", "hra-pairs")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return read()


def ends(values: Iterable[float], digits: int = 0) -> tuple[str, str]:
    """The least and the largest of some values, as they are written."""
    found = list(values)
    return f"{min(found):.{digits}f}", f"{max(found):.{digits}f}"


def test_what_the_guide_says_of_rates(records: list[Record]) -> None:
    assert [chosen(records, "language", method) for method in TWO] == [5.5e-3, 1e-2]
    found = means(records, "language", "hra-pairs")
    assert "LoRA is best at 5.5e-3, and pairs are equally good at 5.5e-3 and 1e-2" in GUIDE
    assert f"(validation perplexities of {found[5.5e-3]:.1f} and {found[1e-2]:.1f}, means of three seeds)" in GUIDE
    lora, pairs = (searched(records, "language", method) for method in TWO)
    assert "From 1e-3 to 5.5e-3, the validation perplexity of pairs is within 3% of LoRA's" in GUIDE
    assert all(abs(pairs[lr] / lora[lr] - 1) < 0.03 for lr in (1e-3, 3e-3, 5.5e-3))
    low, high = ends(100 * (1 - pairs[lr] / lora[lr]) for lr in (1e-5, 3e-5, 1e-4, 3e-4))
    assert f"from 1e-5 to 3e-4 it is {low} to {high}% lower" in GUIDE
    assert f"At 3e-2, pairs end at {pairs[3e-2]:.0f}, and LoRA diverges" in GUIDE
    assert lora[3e-2] > 1000
    lora, pairs = (searched(records, "newsgroups-1600", method) for method in TWO)
    low, high = ends((score for lr, score in pairs.items() if 1e-3 <= lr <= 3e-2), 1)
    assert f"from 1e-3 to 3e-2 pairs classify between {low}% and {high}%" in GUIDE
    low, high = ends((score for lr, score in lora.items() if 1e-3 <= lr <= 5.5e-3), 1)
    assert f"LoRA classifies {low}% to {high}% up to 5.5e-3, and {lora[1e-2]:.1f}% at 1e-2" in GUIDE


def test_what_the_guide_says_of_several_passes(records: list[Record]) -> None:
    def curves(method: str, lr: float) -> list[list[float]]:
        runs = [run for run in of(records, "language-4-passes", method) if run.lr == lr]
        return [[point[2] for point in run.curve] for run in runs]

    lora, pairs = (curves(method, 5.5e-3) for method in TWO)
    assert len(lora) == len(pairs) == 5
    assert all(min(curve) in curve[:2] for curve in lora) and all(min(curve) == curve[1] for curve in pairs)
    for made, best in ((lora, "one or two passes"), (pairs, "two passes")):
        (low, high), (least, most) = ends(map(min, made)), ends(curve[-1] for curve in made)
        assert f"is best after {best} ({low} to {high}) and ends at {least} to {most}" in GUIDE
    finals = [final_runs(records, "language-4-passes", method) for method in TWO]
    ours = [f"{statistics.mean(scores(runs)):.0f}" for runs in finals]
    assert (
        "After four passes at the rate that was best for LoRA in one pass, "
        f"it is {ours[0]} with LoRA and {ours[1]} with HRA in pairs" in README
    )
    (lora_low,), (pairs_low,) = (curves(method, 1.7e-3) for method in TWO)
    best, last = ([f"{curve[place]:.0f}" for curve in (lora_low, pairs_low)] for place in (1, -1))
    assert f"LoRA at {best[0]} and pairs at {best[1]}, and they end at {last[0]} and {last[1]}" in GUIDE
    assert (min(lora_low), min(pairs_low)) == (lora_low[1], pairs_low[1])


def test_what_the_guide_says_of_seeds_and_gram_schmidt(records: list[Record]) -> None:
    largest = []
    for method in TWO:
        here, there = (
            {run.seed: run.test or 0.0 for run in final_runs(records, task, method)}
            for task in ("language", "language-float32")
        )
        found = difference(here, there)
        assert abs(found.mean) < found.half and len(here) == len(there) == 5
        largest.append(max(abs(here[seed] - there[seed]) for seed in here))
    assert f"differ by up to {largest[1]:.1f} in pairs and by up to {largest[0]:.1f} with LoRA" in GUIDE
    assert "It does not find the teacher that is rotated in four planes, which HRA finds exactly" in GUIDE
    errors = {method: searched(records, "teacher-rotation", method) for method in ("hra", "hra-gs")}
    assert min(errors["hra-gs"].values()) > 20
    assert min(errors["hra"].values()) < 0.01


def test_what_the_guide_says_of_schedule_warmup_and_weight_decay(records: list[Record]) -> None:
    said = {"cosine": "linear one", "constant": "a constant rate", "no-warmup": "no warmup", "decay": "decay 0.1"}
    larger = []
    for name, words in said.items():
        found = validation_gain(records, "language", f"hra-pairs-{name}")
        assert f"{words} {found.mean:+.1f} ± {found.half:.1f}" in GUIDE
        larger += [name] if abs(found.mean) > found.half else []
    assert larger == ["cosine"]
    assert "Only the first difference is larger than its interval" in GUIDE


def test_what_the_guide_says_of_forgetting(records: list[Record]) -> None:
    def tested(task: str) -> list[float]:
        return [statistics.mean(scores(final_runs(records, task, method))) for method in TWO]

    def kept(task: str, name: str, *methods: str) -> list[str]:
        runs = [final_runs(records, task, method) for method in methods]
        return [f"{statistics.mean(run.retention[name] for run in own):.0f}" for own in runs]

    lora, pairs = tested("language-4-bit")
    facts = kept("language-4-bit", FACTS, *TWO)
    said = (
        f"is {lora:.0f} with LoRA and {pairs:.0f} in pairs, and the model completes {facts[0]}% and {facts[1]}% of the"
    )
    assert f"{said} facts" in GUIDE
    lora, pairs = tested("language")
    assert "HRA in pairs ends at a perplexity that is 4% higher than LoRA's" in GUIDE
    assert pairs / lora == pytest.approx(1.04, abs=0.005)
    base, *tales = kept("language", TALES, "base", *TWO)
    facts = kept("language", FACTS, *TWO)
    said = f"rises from {base} to {tales[0]} with LoRA and to {tales[1]} in pairs"
    assert f"{said}, and the model still completes {facts[0]}% and {facts[1]}%" in GUIDE
    full = [kept("language", name, "full")[0] for name in (TALES, FACTS)]
    assert f"learns as much as LoRA and retains the most: {full[0]} and {full[1]}%" in GUIDE


def test_what_the_digits_forget(records: list[Record]) -> None:
    assert "On the digits, what remains varies more between seeds than between methods" in GUIDE
    kept = [
        [run.retention["accuracy on 0 to 4, %"] for run in final_runs(records, "digits", method)]
        for method in (*TWO, "hra")
    ]
    between = max(map(statistics.mean, kept)) - min(map(statistics.mean, kept))
    assert between < min(max(values) - min(values) for values in kept)
