"""Tasks one after the other: what is protected stays, and the table follows from the results."""

from __future__ import annotations

import peft
import pytest
import torch
from learning.sequence import Result, folded, make_table, missing, protect, run
from torch import nn

import hra_fx


@pytest.mark.parametrize("kind", ["LoRA", "HRA"])
def test_inputs_of_all_earlier_tasks_are_protected(kind: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    learned, kept = [], None
    tasks = [torch.randn(2, 16) for _ in range(3)]
    start = model(tasks[2]).detach()
    for x in tasks[:2]:
        learned.append(model(x).detach())
        if kind == "HRA":
            hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["0"]))
        else:
            peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        kept = protect(optimizer, model, [x], 2, kept)
        for _ in range(3):
            model(tasks[2]).square().sum().backward()
            optimizer.step()
        model = folded(model)
        for known, sample in zip(learned, tasks, strict=False):
            torch.testing.assert_close(model(sample), known, rtol=1e-4, atol=1e-4)
    assert type(model[0]) is nn.Linear and kept is not None and kept["0"].shape == (16, 4)
    assert (model(tasks[2]) - start).abs().max() > 0.1


def test_a_tiny_sequence() -> None:
    made = run("lora-protect", 0, 1e-3, 4, tiny=True)
    assert len(made.learned) == 2 and made.learned[1] == made.final[1], "nothing follows the last task"


def result(name: str, seed: int, lr: float, validation: float, final: float) -> Result:
    return Result(name, seed, lr, 0, validation, [90.0, 80.0], [final, final], 1.0, "")


def test_other_seeds_run_with_the_rate_that_is_best_with_the_first() -> None:
    results: list[Result] = []
    for _ in range(3):
        planned = missing(results, [0, 1], ["full"], 16)
        assert planned is not None
        results.append(result(*planned, validation=80 - 1e4 * abs(planned[2] - 1e-4), final=0.0))
    assert [(one.seed, one.lr) for one in results] == [(0, 3e-4), (0, 1e-4), (1, 1e-4)]
    assert missing(results, [0, 1], ["full"], 16) is None


def test_the_table_has_means_of_the_best_rate_and_paired_differences() -> None:
    results = [result("lora", 0, 1e-3, 50.0, 10.0), result("lora", 0, 3e-3, 60.0, 70.0)]
    results += [result("lora", 1, 3e-3, 0.0, 72.0), result("full", 0, 3e-4, 60.0, 60.0)]
    results += [result("full", 1, 3e-4, 60.0, 64.0)]
    rows = make_table(results).splitlines()
    assert rows[2] == "| LoRA | 0.003 | 2 | 85.0 ± 0.00 | 71.0 ± 1.41 | 14.0 ± 1.41 | - |"
    # (-10 and -8: their standard deviation is the square root of 2, so the error is 1, times Student's 12.706)
    assert rows[3] == "| full fine-tuning | 0.0003 | 2 | 85.0 ± 0.00 | 62.0 ± 2.83 | 23.0 ± 2.83 | -9.00 ± 12.7 |"
