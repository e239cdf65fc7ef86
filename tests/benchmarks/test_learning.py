"""HRA compared with other methods: tiny runs, the records, and statistics of them."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from learning import kept, page
from learning.directions import lora_layers, main_inputs, protect_lora
from learning.keeping import ALL
from learning.methods import METHODS, layer_shapes
from learning.rates import GRID, final_runs, lost
from learning.records import Record, read
from learning.summary import difference
from learning.tasks import TASKS
from learning.training import count, fit, moved, run
from torch import nn

TASK = "teacher-rotation"
#: The others read and embed texts, and even the configuration of SmolLM2 takes ten seconds.
QUICK = ("teacher-rotation", "digits")
SLOW = ("newsgroups-1600", "newsgroups-retrieval", "language", "language-4-bit")


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("task", [*QUICK, *(slow(name) for name in SLOW)])
def test_a_tiny_run_of_each_task(task: str) -> None:
    record, *scaled = run(task, "hra-pairs", 0, 1e-2, test=True, tiny=True)
    assert [one.method for one in scaled] == ["hra-pairs@0.75", "hra-pairs@0.5"] * task.startswith("language")
    assert record.trainable > 0 and record.test is not None
    assert record.validation > 0 or TASKS[task].higher_is_better
    assert bool(record.retention) is (task in ("digits", "newsgroups-retrieval") or task.startswith("language"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_at_the_base_model_and_moves(method: str) -> None:
    """With about as many parameters as LoRA."""
    task = TASKS[TASK](0, tiny=True)
    model = task.model()
    base, inputs, rank = copy.deepcopy(model), task.model_inputs(list(range(8))), ALL[method].rank
    ALL[method].insert(model, task, rank(layer_shapes(model, task.targets), task.lora_rank))
    if method in ("dora", "oft", "boft", "psoft", "miss", "hra", "hra-peft"):
        assert abs(count(model) - 1024) <= 0.13 * 1024
    if method != "hra-gs":  # starts at random, as in PEFT
        torch.testing.assert_close(model(inputs), base(inputs), atol=1e-5, rtol=1e-5)
    fit(model, nn.Module(), task, ALL[method], 1e-2)
    whole = moved(model, base, task.targets)
    assert (whole > 1e-3) is (method not in ("base", "head")), "the task has no head"
    if rescale := ALL[method].rescale:  # it keeps a part of its change
        rescale(model, base, 0.75, 1.0)
        rescale(model, base, 0.5, 0.75)
        assert moved(model, base, task.targets) == pytest.approx(whole / 2, rel=1e-3)


def test_protected_lora_does_not_read_the_main_directions_of_inputs() -> None:
    task = TASKS[TASK](0, tiny=True)
    model = task.model()
    ALL["lora"].insert(model, task, 4)
    inputs = torch.randn(200, 3) @ torch.randn(3, 64)
    layer = lora_layers(model)["0"]
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    protect_lora(optimizer, model, main_inputs(model, lora_layers(model), inputs.split(50), 3))
    for _ in range(3):
        model(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer(inputs), layer.base_layer(inputs), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(layer(torch.eye(64)), layer.base_layer(torch.eye(64)), atol=1e-3)


def test_a_recorded_run_can_be_made_again() -> None:
    recorded = final_runs(read(), "teacher-dense", "hra")
    (again,) = run("teacher-dense", "hra", 0, recorded[0].lr, test=True)
    assert again.trainable == recorded[0].trainable and again.test is not None
    scores = [record.test for record in recorded if record.test is not None]
    assert abs(again.test - scores[0]) <= statistics.stdev(scores)


def record(lr: float, validation: float, test: float | None, method: str = "lora", moved: float = 0.1) -> Record:
    return Record(TASK, method, 4, 0, lr, 64, validation, test, 0, 1, moved=moved)


def test_the_lost_part_is_a_share_of_what_training_gains() -> None:
    at = dict(zip(GRID, (4.0, 2.0, 1.0, 2.0, 4.0, 8.0, 100.0), strict=True))
    records = [record(lr, score, None) for lr, score in at.items()] + [record(0.0, 4.0, 4.0, "base")]
    assert [round(part, 2) for part in lost(records, TASK, "lora").values()] == [1, 0.5, 0, 0.5, 1, 1, 1]


def test_differences_are_paired_by_seed() -> None:
    found = difference({0: 3.0, 1: 5.0, 2: 7.0, 9: 100.0}, {0: 1.0, 1: 4.0, 2: 4.0})
    error = statistics.stdev([2.0, 1.0, 3.0]) / 3**0.5
    assert (found.mean, found.error) == (2.0, pytest.approx(error))
    assert found.half == pytest.approx(4.303 * error), "Student's t with two degrees of freedom"


def test_pages_have_the_tables_and_the_picture_of_the_records() -> None:
    for file, text in page.files(read()).items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name}: run `make bench-learning BENCH_FLAGS=--kept`"


def test_plain_runs_are_compared_where_the_weights_moved_as_far() -> None:
    scales = [record(1e-2, 0.0, score, moved=far) for far, score in ((0.1, 100.0), (0.2, 400.0))]
    assert kept.at_movement(scales, 0.15, "") == pytest.approx(200.0)
    assert kept.at_movement(scales, 0.25, "") == pytest.approx(800.0)
