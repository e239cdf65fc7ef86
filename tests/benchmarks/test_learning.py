"""The comparison of HRA with other methods: tiny runs of each task, and that a recorded run can be made again."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
import transformers
from learning.methods import METHODS, layer_shapes, reflections
from learning.plan import TASK_NAMES, methods_of
from learning.rates import chosen, final_runs
from learning.records import read
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


def test_methods_that_train_try_as_many_rates() -> None:
    assert {len(method.rates) for name, method in ALL.items() if name != "base"} == {4}
    assert METHODS["base"].rates == ()


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
