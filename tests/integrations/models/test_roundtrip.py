"""Copies, files and the fold: what comes back is what went in."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import networkx as nx
import pytest
import torch
from integrations.models.zoo import EVERY, VISION, Case, adapted, assert_same, folded_copy, rotated_weights, vectors_of
from torch import fx, nn

import hra_fx

every = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)


def outputs(model: nn.Module, case: Case) -> object:
    with torch.no_grad():
        return model(**case.inputs(2, case.sizes[0]))


@every
def test_deepcopy_is_the_same_and_its_own(case: Case) -> None:
    _, model = adapted(case)
    before = outputs(model, case)
    twin = copy.deepcopy(model)
    assert_same(outputs(twin, case), before, rtol=1e-12)
    with torch.no_grad():
        for vectors in vectors_of(twin).values():
            vectors.neg_().add_(1)
    assert_same(outputs(model, case), before, rtol=1e-12)
    with pytest.raises(AssertionError):
        assert_same(outputs(twin, case), before)


@every
def test_state_dict_round_trip(case: Case) -> None:
    base, model = adapted(case)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    added = {key for key in state if ".hra_u." in key}
    assert [key for key in state if key not in added] == list(base.state_dict())
    assert added == {f"{path}.hra_u.{name}" for path in vectors_of(model) for name in ("default", "default_anchor")}
    other = hra_fx.transform(case.base(), case.config())
    other.load_state_dict(state)
    assert_same(outputs(other, case), outputs(model, case), rtol=1e-12)


@every
def test_torch_save_and_load(case: Case, tmp_path: Path) -> None:
    _, model = adapted(case)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same(outputs(loaded, case), outputs(model, case), rtol=1e-12)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert loaded.__class__.__name__ == type(case.base()).__name__
    assert len(hra_fx.report(loaded)) == len(hra_fx.report(model))
    assert_same(outputs(hra_fx.fold(loaded), case), outputs(model, case))


@every
def test_fold(case: Case) -> None:
    base, model = adapted(case)
    before = outputs(model, case)
    expected = folded_copy(base, model)
    rotated = {name for name, _ in rotated_weights(base, model)}
    folded = hra_fx.fold(model)
    assert folded is model
    assert [(path, type(part)) for path, part in folded.named_modules()] == [
        (path, type(part)) for path, part in base.named_modules()
    ]
    assert list(folded.state_dict()) == list(base.state_dict())
    for name, value in folded.state_dict().items():
        if name in rotated:
            assert_same(value, expected.state_dict()[name], rtol=1e-12)
        else:
            assert torch.equal(value, base.state_dict()[name]), name
    assert {n: p.requires_grad for n, p in folded.named_parameters()} == {
        n: p.requires_grad for n, p in base.named_parameters()
    }
    assert_same(outputs(folded, case), before)
    assert_same(outputs(folded, case), outputs(expected, case), rtol=1e-12)


def network(graph: fx.Graph) -> nx.DiGraph:
    """The data flow, with nodes labeled by operation and target."""
    network = nx.DiGraph()
    for node in graph.nodes:
        network.add_node(node.name, label=(node.op, str(node.target)))
        network.add_edges_from((read.name, node.name) for read in node.all_input_nodes)
    return network


@pytest.mark.parametrize("case", VISION, ids=lambda case: case.name)
def test_graph_after_fold_is_that_of_the_base(case: Case) -> None:
    base, model = adapted(case)
    hra_fx.fold(model)
    for training in (False, True):
        expected, actual = (fx.symbolic_trace(each.train(training)).graph for each in (base, model))
        assert nx.vf2pp_is_isomorphic(network(actual), network(expected), node_label="label")
        assert [str(node) for node in actual.nodes] == [str(node) for node in expected.nodes]


@every
def test_transform_fold_and_again(case: Case) -> None:
    _, model = adapted(case)
    before = outputs(model, case)
    again = hra_fx.transform(hra_fx.fold(model), case.config())
    assert_same(outputs(again, case), before)
