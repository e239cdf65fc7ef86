"""`to_networkx`, compared with torch.fx, hooks, `torch.export` and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
import torchvision
from adapting import QUIET, adapted, randomise
from drawn_models import Shared
from tiny import llama
from torch import fx, nn

import hra_fx
from hra_fx.errors import HRAWarning, VisualizeError

IDS = torch.arange(10).reshape(2, 5)


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
    assert sum(data["parameters"] for data in nodes(base)) == sum(p.numel() for p in plain.parameters())
    assert not layers_in(base) and not any("skipped" in data for data in nodes(base))
    for found in (base, graph):
        assert nx.is_directed_acyclic_graph(found)
        assert [data["target"] for data in nodes(found) if data["op"] == "call_module"] == calls
    shapes = {data["target"]: data["shape"] for data in nodes(graph) if data["op"] == "call_module"}
    assert shapes == {path: seen[path] for path in shapes}
    blocks = [f"layer{stage}.{block}.conv1" for stage in range(1, 5) for block in range(2)]
    assert layers_in(graph) == {"conv1", "fc", *blocks}
    read = nx.parse_graphml("\n".join(nx.generate_graphml(graph, named_key_ids=True)))
    assert (dict(read.nodes(data=True)), list(read.edges)) == (dict(graph.nodes(data=True)), list(graph.edges))
    (data,) = (data for data in nodes(graph) if data.get("adapted_layers") == "layer1.0.conv1")
    assert (data["d"], data["r"], data["adapters"], data["kind"]) == (64 * 9, 3, "default", "adapted_layer")
    assert (data["detail"], data["module"], data["dtype"]) == ("Conv2d 64→64 3x3", "layer1.0", "float32")
    skipped = {data["target"] for data in nodes(graph) if "skipped" in data}
    assert skipped == {path for path in calls if "conv2" in path or "downsample.0" in path}


def test_values_are_those_of_active_adapters_or_else_of_all() -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = adapted(layers, r=1, target_modules=["0"])
    hra_fx.add_adapter(model, "wide", hra_fx.HRAConfig(r=4, target_modules=["0", "2"], pairs=False))
    with torch.no_grad():
        model.get_submodule("0").hra_u["wide"].normal_()  # type: ignore[index,operator,union-attr]
    rows = {(row.path, row.adapter): row for row in hra_fx.report(model)}
    assert rows["0", "wide"].mean_angle != rows["0", "default"].mean_angle
    turned_by = {data["adapted_layers"]: data["mean_angle"] for data in nodes(hra_fx.to_networkx(model)) if "r" in data}
    assert turned_by == {"0": rows["0", "default"].mean_angle, "2": rows["2", "wide"].mean_angle}


@QUIET
def test_example_inputs_give_the_whole_graph_of_a_model_that_fx_cannot_trace_and_exported_programs() -> None:
    model = adapted(llama(), r=2, target_modules=["q_proj", "v_proj", "gate_proj"])
    graph = hra_fx.to_networkx(model, {"input_ids": IDS})
    assert layers_in(graph) == {row.path for row in hra_fx.report(model)}
    assert nx.is_weakly_connected(graph)
    program = torch.export.export(llama(), (), {"input_ids": IDS, "use_cache": False}, strict=False)
    plain = hra_fx.to_networkx(program)
    assert not layers_in(plain)
    assert nx.utils.graphs_equal(hra_fx.to_networkx(program.module()), plain)


def test_parameters_of_shared_and_read_weights_count_once_also_in_a_single_layer(tmp_path: Path) -> None:
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    for model, targets in ((Shared(), ["fc"]), (encoder, ["self_attn", "linear1"])):
        count = sum(p.numel() for p in model.parameters())
        hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=targets))
        assert sum(data["parameters"] for data in nodes(hra_fx.to_networkx(model))) == count
    for model in (nn.Linear(3, 4), nn.Identity()):
        (data,) = nodes(hra_fx.to_networkx(model))
        assert (data["name"], data["parameters"]) == (type(model).__name__, sum(p.numel() for p in model.parameters()))
        assert type(model).__name__ in hra_fx.visualize(model, tmp_path / "a.svg").read_text(encoding="utf-8")


def test_errors() -> None:
    with pytest.raises(VisualizeError, match=r"`model` must be a torch\.nn\.Module, .*, got str\."):
        hra_fx.to_networkx("resnet18")
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),))
    with pytest.raises(VisualizeError, match=r"`example_inputs` must be None for an .*, which already has"):
        hra_fx.to_networkx(program, torch.ones(1, 3))
    with pytest.warns(HRAWarning, match=r"The picture has no data flow: torch\.export cannot capture Llama"):
        hra_fx.to_networkx(llama(), {"tokens": IDS})


# ---- adapters that are merged, disabled or missing ----


def two_adapters() -> Any:
    layers = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    model = hra_fx.transform(layers, hra_fx.HRAConfig(r=4, target_modules=["0", "2"]))
    hra_fx.add_adapter(model, "two", hra_fx.HRAConfig(r=2, target_modules=["0"]))
    hra_fx.set_adapter(model, ["default", "two"])
    randomise(model)
    return model


def test_a_merged_adapter_is_shown_as_active_and_a_disabled_one_is_not(tmp_path: Path) -> None:
    def picture() -> str:
        return hra_fx.visualize(model, tmp_path / "a.svg").read_text(encoding="utf-8")

    model = two_adapters()
    before = picture()
    assert "r 6 · d 12" in before
    with hra_fx.disable_adapters(model):
        assert picture().count(">no active adapter<") == 2
    hra_fx.merge_adapter(model)
    assert picture() == before


def test_a_single_adapted_layer_and_inputs_of_a_wrong_shape_say_what_to_do(tmp_path: Path) -> None:
    layer = two_adapters()[0]
    assert [row.path for row in hra_fx.report(layer)] == ["", ""]
    with pytest.raises(VisualizeError, match=r"`model` is a single adapted layer \(Linear\).*path as `focus`"):
        hra_fx.visualize(layer, tmp_path / "a.svg")
    with pytest.warns(HRAWarning, match=r"The graph does not run on `example_inputs` .*no shapes"):
        hra_fx.visualize(two_adapters(), tmp_path / "a.svg", example_inputs=torch.zeros(2, 5))
