"""Whole models: saving them with torch, the graph after a fold, hidden states and attentions.

Outputs, gradients, copies, states and folds of many more models are tested in `tests/zoo`.
"""

from __future__ import annotations

import copy
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import fx, nn
from zoo.oracle import Oracle, randomise
from zoo.outputs import cast, distances, flat, seed
from zoo.refusing import transform_most
from zoo.registry import entries

import hra_fx

ENTRIES = entries()
TRACEABLE = ["torchvision/resnet18", "timm/vit_tiny_patch16_224", "torchvision/convnext_tiny"]
SAVED = ["torchvision/resnet18", "timm/vit_tiny_patch16_224", "transformers/bert"]
WITH_ATTENTIONS = ["transformers/bert", "transformers/t5", "transformers/llama"]


def adapted(name: str) -> tuple[nn.Module, nn.Module, hra_fx.HRAConfig]:
    """A base model in float64, a copy with random vectors in all layers that can be adapted, and its configuration."""
    seed(0)
    base = ENTRIES[name].build().double().eval()
    model = copy.deepcopy(base)
    config, _, _ = transform_most(model)
    assert config is not None
    randomise(model)
    return base, model, config


def distance(model: nn.Module, other: nn.Module, name: str, **options: bool) -> float:
    """The largest relative difference of any output of two models."""
    outputs = []
    for each in (model, other):
        seed(7)
        args, kwargs = ENTRIES[name].call(2, 0)
        with torch.no_grad():
            outputs.append(flat(each(*cast(args, torch.float64), **cast(kwargs, torch.float64), **options)))
    return max(distances(*outputs).values())


@pytest.mark.parametrize("name", SAVED)
def test_a_model_saved_with_torch_loads_folds_and_can_be_adapted_again(name: str, tmp_path: Path) -> None:
    base, model, config = adapted(name)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert type(loaded).__name__ == type(base).__name__
    assert len(hra_fx.report(loaded)) == len(hra_fx.report(model))
    assert distance(loaded, model, name) < 1e-12
    assert distance(loaded, base, name) > 1e-3
    again = hra_fx.transform(hra_fx.fold(loaded), config)
    assert distance(again, model, name) < 1e-9


def network(graph: fx.Graph) -> nx.DiGraph:
    """The data flow, with nodes labeled by operation and target."""
    network = nx.DiGraph()
    for node in graph.nodes:
        network.add_node(node.name, label=(node.op, str(node.target)))
        network.add_edges_from((read.name, node.name) for read in node.all_input_nodes)
    return network


@pytest.mark.parametrize("name", TRACEABLE)
def test_the_graph_after_a_fold_is_that_of_the_base(name: str) -> None:
    base, model, _ = adapted(name)
    hra_fx.fold(model)
    for training in (False, True):
        expected, actual = (fx.symbolic_trace(each.train(training)).graph for each in (base, model))
        assert nx.vf2pp_is_isomorphic(network(actual), network(expected), node_label="label")
        assert [str(node) for node in actual.nodes] == [str(node) for node in expected.nodes]


@pytest.mark.parametrize("name", WITH_ATTENTIONS)
def test_hidden_states_and_attentions_are_those_of_the_rotated_weights(name: str) -> None:
    base, model, _ = adapted(name)
    for each in (base, model):
        each.set_attn_implementation("eager")  # type: ignore[operator]
    options = {"output_hidden_states": True, "output_attentions": True}
    assert distance(model, Oracle(base, model).plain, name, **options) < 1e-9
    assert distance(model, base, name, **options) > 1e-3
