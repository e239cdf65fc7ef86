"""`scale` prints what `reporting.scale` computes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from cli.conftest import Shelf
from cli.shell import Answer, answer, usage

import hra_fx
from hra_fx.reporting.scale import Strategy, costs


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3", "tp"])
def test_the_costs_of_a_model(shelf: Shelf, strategy: Strategy) -> None:
    words = ["--gpus", "4", "--strategy", strategy, "-t", "q_proj", "-t", "down_proj", "-r", "3", "--tokens", "100"]
    found = Answer("scale", shelf / "my-model", *words, "--json")
    model = hra_fx.transform(copy.deepcopy(shelf.model), hra_fx.HRAConfig(r=3, target_modules=["q_proj", "down_proj"]))
    assert found.json == [dataclasses.asdict(cost) for cost in costs(model, 4, strategy, tokens=100)]


def test_the_table_names_methods_and_ranks(shelf: Shelf) -> None:
    text = answer("scale", shelf / "my-model")
    assert "processes  8" in text and "strategy   fsdp2" in text
    hra, lora, equal = costs(
        hra_fx.transform(copy.deepcopy(shelf.model), hra_fx.HRAConfig(target_modules="all-linear")), 8, "fsdp2"
    )
    assert f"HRA, r = 8   LoRA, r = 8   LoRA, r = {equal.rank}" in text
    for cost in (hra, lora, equal):
        assert f"{cost.parameters:,}" in text


def test_wrong_options(shelf: Shelf) -> None:
    assert "--gpus" in usage("scale", shelf / "my-model", "--gpus", "0")
    assert "--strategy" in usage("scale", shelf / "my-model", "--strategy", "zero4")
