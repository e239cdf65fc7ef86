"""`to_networkx`, compared with torch.fx, hooks, `torch.export` and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
import torchvision
from adapting import QUIET, adapted, randomise
from tiny import llama
from torch import fx, nn

import hra_fx
from hra_fx.errors import HRAWarning, VisualizeError

IDS = torch.arange(10).reshape(2, 5)
LAYERS = ("module", "adapted_layer")


def nodes(graph: nx.DiGraph) -> list[dict[str, Any]]:
    return [data for _, data in graph.nodes(data=True)]


def layers_in(graph: nx.DiGraph) -> set[str]:
    return {path for data in nodes(graph) if "adapted_layers" in data for path in data["adapted_layers"].split("\n")}


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=4).eval()


def test_the_nodes_are_the_calls_that_fx_finds_with_the_shapes_of_hooks() -> None:
    plain, image, seen = resnet(), torch.randn(2, 3, 65, 49), dict[str, str]()
    for path, part in plain.named_modules():
        part.register_forward_hook(
            lambda module, args, out, path=path: seen.__setitem__(path, "×".join(map(str, out.shape)))
        )
    plain(image)
    calls = [str(node.target) for node in fx.symbolic_trace(resnet()).graph.find_nodes(op="call_module")]
    base = hra_fx.to_networkx(resnet())
    graph = hra_fx.to_networkx(adapted(resnet(), r=3, target_modules=["conv1", "fc"]), image)
    assert not layers_in(base) and not any("skipped" in data for data in nodes(base))
    for found in (base, graph):
        assert nx.is_directed_acyclic_graph(found)
        assert [data["target"] for data in nodes(found) if data["kind"] in LAYERS] == calls
    shapes = {data["target"]: data["shape"] for data in nodes(graph) if data["kind"] in LAYERS}
    assert shapes == {path: seen[path] for path in shapes}
    blocks = [f"layer{stage}.{block}.conv1" for stage in range(1, 5) for block in range(2)]
    assert layers_in(graph) == {"conv1", "fc", *blocks}
    read = nx.parse_graphml("\n".join(nx.generate_graphml(graph, named_key_ids=True)))
    assert (dict(read.nodes(data=True)), list(read.edges)) == (dict(graph.nodes(data=True)), list(graph.edges))
    (data,) = (data for data in nodes(graph) if data.get("adapted_layers") == "layer1.0.conv1")
    assert (data["d"], data["r"], data["kind"]) == (64 * 9, 3, "adapted_layer")
    assert (data["detail"], data["module"]) == ("Conv2d 64→64 3x3", "layer1.0")
    skipped = {data["target"] for data in nodes(graph) if "skipped" in data}
    assert skipped == {path for path in calls if "conv2" in path or "downsample.0" in path}


def test_values_are_those_of_active_adapters(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = adapted(layers, r=1, target_modules=["0"])
    hra_fx.add_adapter(model, "wide", hra_fx.HRAConfig(r=4, target_modules=["0", "2"], pairs=False))
    randomise(model)
    found = {data["name"]: data for data in nodes(hra_fx.to_networkx(model)) if "r" in data}
    (row,) = (row for row in hra_fx.report(model) if row.active)
    assert (found["0"]["weight_change"], found["0"]["r"]) == (row.weight_change, 1)
    assert (found["2"]["weight_change"], found["2"]["r"]) == (0.0, 0)
    assert "no active adapter" in hra_fx.visualize(model, tmp_path / "a.svg").read_text(encoding="utf-8")
    before = hra_fx.to_networkx(model)
    hra_fx.merge_adapter(model)
    assert nx.utils.graphs_equal(hra_fx.to_networkx(model), before), "a merged adapter is active"


@QUIET
def test_example_inputs_give_the_whole_graph_of_a_model_that_fx_cannot_trace_and_exported_programs() -> None:
    model = adapted(llama(), r=2, target_modules=["q_proj", "v_proj", "gate_proj"])
    graph = hra_fx.to_networkx(model, {"input_ids": IDS})
    assert layers_in(graph) == {row.path for row in hra_fx.report(model)}
    assert nx.is_weakly_connected(graph)
    program = torch.export.export(llama(), (), {"input_ids": IDS, "use_cache": False}, strict=False)
    plain = hra_fx.to_networkx(program.module())
    assert not layers_in(plain) and nx.is_weakly_connected(plain)


def test_a_single_layer_is_one_box(tmp_path: Path) -> None:
    for model in (nn.Linear(3, 4), nn.Identity(), adapted(nn.Sequential(nn.Linear(3, 3)), target_modules=["0"])[0]):
        (data,) = nodes(hra_fx.to_networkx(model))
        assert data["name"] == type(model).__name__
        assert data["name"] in hra_fx.visualize(model, tmp_path / "a.svg").read_text(encoding="utf-8")


def test_errors() -> None:
    with pytest.raises(VisualizeError, match=r"`model` must be a torch\.nn\.Module .*, got str\."):
        hra_fx.to_networkx("resnet18")
    with pytest.raises(VisualizeError, match=r"got ExportedProgram\. Of an ExportedProgram, pass its module\(\)\."):
        hra_fx.to_networkx(torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),)))
    with pytest.warns(HRAWarning, match=r"The picture has no data flow: torch\.export cannot capture Llama"):
        hra_fx.to_networkx(llama(), {"tokens": IDS})
    two = adapted(nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12)), target_modules=["0"])
    with pytest.warns(HRAWarning, match=r"The graph does not run on `example_inputs` .*no shapes"):
        hra_fx.to_networkx(two, torch.zeros(2, 5))


def test_shapes_come_from_a_call_that_does_not_change_the_model() -> None:
    model = adapted(nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12)), target_modules=["0"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = {data["name"]: data["shape"] for data in nodes(hra_fx.to_networkx(model, torch.randn(2, 12)))}
    assert found["1"] == "2×12"
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
