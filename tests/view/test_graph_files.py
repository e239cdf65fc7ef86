"""DOT, GraphML and Model Explorer's JSON: files for other programs."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from typing import Any

import networkx as nx
import pytest
import torch
from drawn_models import MAKERS, Residual, drawing, drawn
from torch import nn

import hra_fx
from hra_fx.view import dot, graphml, model_explorer
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.options import Options

OPTIONS = [Options(heat="mean_angle"), Options(depth=0, heat="share")]
_TOKEN = re.compile(r'\s+|//[^\n]*|"(?:[^"\\]|\\.)*"|->|[{}\[\];=,]|\w[\w.]*')


def tokens(text: str) -> list[str]:
    """The tokens of DOT, without blanks and comments."""
    found: list[str] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        assert match, text[place : place + 40]
        place = match.end()
        if match[0].strip() and not match[0].startswith("//"):
            found.append(match[0])
    return found


def flow(drawing: Drawing) -> set[tuple[str, str]]:
    return set(drawing.picture.edges)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_dot_is_whole_and_balanced(name: str, options: Options) -> None:
    words = tokens(dot.render(drawing(name), options))
    assert words[0] == "digraph"
    for opening, closing in ("{}", "[]"):
        heights = [0]
        for word in words:
            heights.append(heights[-1] + (word == opening) - (word == closing))
        assert min(heights) == heights[-1] == 0
    declared = [word for word, after in pairwise(words) if after == "[" and word[1:].isdigit()]
    assert len(set(declared)) == len(declared)
    ends = [(words[i - 1], words[i + 1]) for i, word in enumerate(words) if word == "->"]
    assert {end for pair in ends for end in pair} <= set(declared)
    assert len(set(ends)) == len(ends)
    clusters = [words[i + 1] for i, word in enumerate(words) if word == "subgraph"]
    assert len(set(clusters)) == len(clusters)


def test_dot_has_every_edge_and_the_limits_that_keep_graphviz_fast() -> None:
    found = drawing("resnet")
    text = dot.render(found, Options())
    assert text.count("->") == len(flow(found))
    assert "nslimit=1, nslimit1=1, mclimit=0.5" in text
    assert 'label="layer2.1 · BasicBlock"' in text


def test_dot_marks_skipped_layers() -> None:
    text = dot.render(drawing("llama"), Options())
    assert sum("has no adapter: " in line for line in text.split("\n")) == 10


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_graphml_read_back_equals_what_was_written(name: str, options: Options) -> None:
    found = drawing(name)
    written = graphml.plain(found, options)
    read = nx.parse_graphml(graphml.render(found, options).decode("utf-8"))
    assert list(read) == list(written)
    assert dict(read.nodes(data=True)) == dict(written.nodes(data=True))
    assert list(read.edges) == list(written.edges)
    assert {key: read.graph[key] for key in written.graph} == dict(written.graph)


def test_graphml_is_the_graph_of_to_networkx() -> None:
    model = drawn("resnet")
    read = nx.parse_graphml(graphml.render(drawing_of(model), Options()).decode("utf-8"))
    graph = hra_fx.to_networkx(model)
    assert set(read.edges) == set(graph.edges)
    for key, data in graph.nodes(data=True):
        assert read.nodes[key] == {name: value for name, value in data.items() if value != ""}


def test_names_that_only_differ_in_what_xml_cannot_hold_stay_apart() -> None:
    model = nn.Sequential()
    for name in ("a\x01", "a\x02", "a\ufffd"):
        model.add_module(name, nn.Linear(4, 4))
    drawing = drawing_of(model)
    read = nx.parse_graphml(graphml.render(drawing, Options()).decode("utf-8"))
    assert len(read) == len(drawing.picture) == 5
    assert len(read.edges) == 4


def test_graphml_has_the_heat() -> None:
    graph = graphml.plain(drawing("resnet"), Options(heat="mean_angle"))
    rows = {row.path: row for row in hra_fx.report(drawn("resnet"))}
    heats = {
        data["adapted_layers"]: data["heat_mean_angle"]
        for _, data in graph.nodes(data=True)
        if "adapted_layers" in data
    }
    assert heats == {path: pytest.approx(math.degrees(row.mean_angle)) for path, row in rows.items()}


# The structures of graph_builder.py and node_data_builder.py of ai-edge-model-explorer 0.1: field -> type; a list
# with one entry is a list of such things, a dict with `str` one from names to such things.
_PAIR = {"key": str, "value": str}
_ITEM = {"id": str, "attrs": [_PAIR]}
_EDGE = {"sourceNodeId": str, "sourceNodeOutputId": str, "targetNodeInputId": str}
_NODE: dict[str, Any] = {
    **{"id": str, "label": str, "namespace": str, "attrs": [_PAIR], "incomingEdges": [_EDGE]},
    **{"outputsMetadata": [_ITEM], "inputsMetadata": [_ITEM], "subgraphIds": [str]},
}
_GRAPH = {"id": str, "nodes": [_NODE], "groupNodeAttributes": {str: {str: str}}}
_RESULT = {"value": (int, float), "bgColor": str, "textColor": str}
_STOP = {"stop": (int, float), "bgColor": str, "textColor": str}
_NODE_DATA = {"name": str, "results": {str: _RESULT}, "gradient": [_STOP]}
_NEEDED = {id(_NODE): {"id", "label"}, id(_GRAPH): {"id"}, id(_PAIR): {"key", "value"}, id(_EDGE): {"sourceNodeId"}} | {
    id(_NODE_DATA): {"results"},
    id(_RESULT): {"value"},
    id(_STOP): {"stop"},
}


def fits(value: Any, structure: Any) -> None:
    """Fails where a value is not of a structure."""
    if isinstance(structure, list):
        assert isinstance(value, list)
        for entry in value:
            fits(entry, structure[0])
    elif isinstance(structure, dict) and str in structure:
        assert isinstance(value, dict)
        for name, entry in value.items():
            fits(name, str)
            fits(entry, structure[str])
    elif isinstance(structure, dict):
        assert isinstance(value, dict)
        assert value.keys() <= structure.keys()
        assert value.keys() >= _NEEDED.get(id(structure), set())
        for name, entry in value.items():
            fits(entry, structure[name])
    else:
        assert isinstance(value, structure)
        assert not isinstance(value, bool)


def loaded(drawing: Drawing, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """The graph, and its node data if there are any."""
    content = json.loads(model_explorer.render(drawing, options))
    fits(content.pop("label"), str)
    (graph,) = content.pop("graphs")
    assert set(content) <= {graph["id"]}
    return graph, content.get(graph["id"], {})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_json_is_what_model_explorer_documents(name: str, options: Options) -> None:
    graph, data = loaded(drawing(name), options)
    fits(graph, _GRAPH)
    fits(data, _NODE_DATA)
    ids = [node["id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids)
    assert {edge["sourceNodeId"] for node in graph["nodes"] for edge in node["incomingEdges"]} <= set(ids)
    assert data["results"].keys() <= set(ids)
    assert [data["gradient"][end]["stop"] for end in (0, -1)] == [0, 1]
    levels = {node["namespace"] for node in graph["nodes"]}
    assert levels <= graph["groupNodeAttributes"].keys()


def test_namespaces_are_the_modules() -> None:
    graph, _ = loaded(drawing("resnet"), Options())
    places = {node["namespace"] for node in graph["nodes"]}
    assert {place for place in places if place.startswith("layer3")} == {"layer3/0", "layer3/1", "layer3/0/downsample"}
    assert [node["namespace"] for node in graph["nodes"] if node["label"] == "fc"] == [""]
    assert graph["groupNodeAttributes"]["layer3/1"] == {"module": "layer3.1", "class": "BasicBlock"}
    assert loaded(drawing("hostile"), Options())[0]["nodes"][0]["namespace"] == ""


def test_a_slash_in_a_name_is_no_level() -> None:
    model = nn.Sequential()
    model.add_module("a/b", Residual())
    graph, _ = loaded(drawing_of(model), Options())
    assert {node["namespace"].count("/") for node in graph["nodes"]} == {0}


def test_node_data_are_the_numbers_of_the_report() -> None:
    rows = {row.path: row for row in hra_fx.report(drawn("resnet"))}
    for heat, name, value in (
        (None, "weight change (%)", lambda row: 100 * row.weight_change),
        ("mean_angle", "mean angle (°)", lambda row: math.degrees(row.mean_angle)),
        ("rotation", "|Q - I|", lambda row: row.rotation),
    ):
        graph, data = loaded(drawing("resnet"), Options(heat=heat))
        assert data["name"] == name
        sites = {
            pair["value"]: node["id"]
            for node in graph["nodes"]
            for pair in node["attrs"]
            if pair["key"] == "adapted layer"
        }
        assert sites.keys() == rows.keys()
        for path, key in sites.items():
            assert data["results"][key]["value"] == pytest.approx(value(rows[path]), rel=1e-5)


def test_shapes_are_told_where_they_are_known() -> None:
    drawing = drawing_of(drawn("resnet"), (torch.zeros(1, 3, 64, 64),))
    graph, _ = loaded(drawing, Options())
    shapes = {node["label"]: node.get("outputsMetadata") for node in graph["nodes"]}
    assert shapes["fc"] == [{"id": "0", "attrs": [{"key": "tensor_shape", "value": "float32[1,1000]"}]}]
