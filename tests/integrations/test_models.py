"""Hidden states and attentions of whole models. Everything else that a model returns is tested in `tests/zoo`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo.oracle import Oracle, randomise
from zoo.outputs import cast, distances, flat, seed
from zoo.refusing import transform_most
from zoo.registry import entries

ENTRIES = entries()
WITH_ATTENTIONS = ["transformers/bert", "transformers/t5", "transformers/llama"]


def adapted(name: str) -> tuple[nn.Module, nn.Module]:
    """A base model in float64, and a copy with random vectors in all layers that can be adapted."""
    seed(0)
    base = ENTRIES[name].build().double().eval()
    model = copy.deepcopy(base)
    transform_most(model)
    randomise(model)
    return base, model


def distance(model: nn.Module, other: nn.Module, name: str, **options: bool) -> float:
    """The largest relative difference of any output of two models."""
    outputs = []
    for each in (model, other):
        seed(7)
        args, kwargs = ENTRIES[name].call(2, 0)
        with torch.no_grad():
            outputs.append(flat(each(*cast(args, torch.float64), **cast(kwargs, torch.float64), **options)))
    return max(distances(*outputs).values())


@pytest.mark.parametrize("name", WITH_ATTENTIONS)
def test_hidden_states_and_attentions_are_those_of_the_rotated_weights(name: str) -> None:
    base, model = adapted(name)
    for each in (base, model):
        each.set_attn_implementation("eager")  # type: ignore[operator]
    options = {"output_hidden_states": True, "output_attentions": True}
    assert distance(model, Oracle(base, model).plain, name, **options) < 1e-9
    assert distance(model, base, name, **options) > 1e-3
