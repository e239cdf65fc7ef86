"""DOT and GraphML: files for other programs."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import networkx as nx
import pytest
from drawn_models import MAKERS, drawing, drawn
from torch import nn

import hra_fx
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.network import collapsed, plain, render_dot, render_graphml
from hra_fx.view.opening import Options
from hra_fx.view.tree import Leaf

OPTIONS = [Options(heat="mean_angle"), Options(depth=0, heat="share")]
_TOKEN = re.compile(r'\s+|"(?:[^"\\]|\\.)*"|->|[{}\[\];=,]|\w[\w.]*')


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_dot_has_every_box_and_every_edge_once(name: str, options: Options) -> None:
    text = render_dot(drawing(name), options)
    words = [word for word in _TOKEN.findall(text) if word.strip()]
    assert "".join(_TOKEN.findall(text)) == text, "nothing but tokens"
    for opening, closing in ("{}", "[]"):
        heights = [0]
        for word in words:
            heights.append(heights[-1] + (word == opening) - (word == closing))
        assert min(heights) == heights[-1] == 0
    picture = collapsed(drawing(name), options.depth).picture
    declared = [word for word, after in pairwise(words) if after == "[" and word[1:].isdigit()]
    assert sorted(declared) == sorted(f"n{index}" for index in range(len(picture)))
    names = dict(zip(picture, (f"n{index}" for index in range(len(picture))), strict=True))
    ends = [(words[i - 1], words[i + 1]) for i, word in enumerate(words) if word == "->"]
    assert sorted(ends) == sorted((names[a], names[b]) for a, b in picture.edges)
    clusters = [words[i + 1] for i, word in enumerate(words) if word == "subgraph"]
    assert len(set(clusters)) == len(clusters)


def test_dot_has_modules_and_the_reasons_of_skipped_layers() -> None:
    assert 'label="layer2.1 · BasicBlock"' in render_dot(drawing("resnet"), Options())
    text = render_dot(drawing("llama"), Options())
    assert sum("has no adapter: " in line for line in text.split("\n")) == 10


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_graphml_read_back_equals_what_was_written(name: str, options: Options) -> None:
    written = plain(drawing(name), options)
    read = nx.parse_graphml(render_graphml(drawing(name), options).decode("utf-8"))
    assert list(read) == list(written)
    assert dict(read.nodes(data=True)) == dict(written.nodes(data=True))
    assert list(read.edges) == list(written.edges)
    assert {key: read.graph[key] for key in written.graph} == dict(written.graph)


def test_graphml_is_the_graph_of_to_networkx_with_the_heat() -> None:
    read, graph = plain(drawing("resnet"), Options(heat="mean_angle")), hra_fx.to_networkx(drawn("resnet"))
    assert set(read.edges) == set(graph.edges)
    for key, data in graph.nodes(data=True):
        heat = {"heat_mean_angle": pytest.approx(math.degrees(data["mean_angle"]))} if "mean_angle" in data else {}
        assert read.nodes[key] == {name: value for name, value in data.items() if value != ""} | heat


def test_names_that_only_differ_in_what_xml_cannot_hold_stay_apart() -> None:
    model = nn.Sequential()
    for name in ("a\x01", "a\x02", "a\ufffd"):
        model.add_module(name, nn.Linear(4, 4))
    read = nx.parse_graphml(render_graphml(drawing_of(model), Options()).decode("utf-8"))
    assert (len(read), len(read.edges)) == (5, 4)


def leaves(drawing: Drawing) -> list[Leaf]:
    return [leaf for _, leaf in drawing.picture.nodes(data="leaf")]


@pytest.mark.parametrize("name", ["resnet", "bert", "llama", "shared", "attention"])
def test_a_closed_module_has_all_that_is_in_it(name: str) -> None:
    found = drawing(name)
    for depth in (None, 9, 1, 0):
        part = leaves(collapsed(found, depth))
        assert sorted(path for leaf in part for path in leaf.marks) == sorted(row.path for row in found.rows)
        assert sum(leaf.parameters for leaf in part) == sum(leaf.parameters for leaf in leaves(found))
        assert depth is None or all(len(leaf.place) <= depth for leaf in part)


def test_with_depth_0_the_children_are_boxes() -> None:
    part = collapsed(drawing("resnet"), 0)
    assert [leaf.name for leaf in leaves(part)] == [
        *("x", "conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "flatten", "fc"),
        "output",
    ]
    assert part.picture.nodes["module:layer3"]["leaf"].detail == "Sequential"
