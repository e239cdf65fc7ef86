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
from hra_fx.view import dot, graphml
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
