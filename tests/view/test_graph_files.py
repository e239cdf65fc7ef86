"""DOT, GraphML and Mermaid: files for other programs."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

import networkx as nx
import pytest
from drawn_models import MAKERS, drawing, drawn, leaves
from torch import nn

import hra_fx
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.network import (
    CHARACTERS,
    EDGES,
    collapsed,
    escape,
    plain,
    render_dot,
    render_graphml,
    render_mermaid as render,
)
from hra_fx.view.opening import Options

OPTIONS = [Options(heat="mean_angle"), Options(depth=0, heat="share")]
_TOKEN = re.compile(r'\s+|"(?:[^"\\]|\\.)*"|->|[{}\[\];=,]|\w[\w.]*')


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_dot_has_every_box_and_every_edge_once(name: str, options: Options) -> None:
    text = render_dot(drawing(name), options)
    words = [word for word in _TOKEN.findall(text) if word.strip()]
    assert "".join(_TOKEN.findall(text)) == text, "nothing but tokens"
    picture = collapsed(drawing(name), options.depth).picture
    names = {key: f"n{index}" for index, key in enumerate(picture)}
    declared = [word for word, after in pairwise(words) if after == "[" and word[1:].isdigit()]
    assert sorted(declared) == sorted(names.values())
    ends = [(words[i - 1], words[i + 1]) for i, word in enumerate(words) if word == "->"]
    assert sorted(ends) == sorted((names[a], names[b]) for a, b in picture.edges)


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


@pytest.mark.parametrize("name", ["resnet", "bert", "llama", "shared", "attention"])
def test_a_closed_module_has_all_that_is_in_it(name: str) -> None:
    found = drawing(name)
    for depth in (None, 9, 1, 0):
        part = leaves(collapsed(found, depth))
        assert sorted(path for leaf in part for path in leaf.marks) == sorted(row.path for row in found.rows)
        assert sum(leaf.parameters for leaf in part) == sum(leaf.parameters for leaf in leaves(found))
        assert depth is None or all(len(leaf.place) <= depth for leaf in part)


# ---- Mermaid text, read by a small grammar of its own: the part of the language that is written ----

#: Between two `<br/>` of a label: nothing that means anything to Mermaid or HTML, but numbers of characters.
_TEXT = r"(?:[A-Za-z0-9 ._/,()=+-]|#\d+;|[^\x00-\xa0]|<br/>)*"
_STATEMENTS = (
    r"flowchart TD",
    r"%% [^%{}]*",
    rf'subgraph m\d+\["{_TEXT}"\]',
    r"end",
    rf'n\d+(?:\["{_TEXT}"\]|\(\["{_TEXT}"\]\)|\[\["{_TEXT}"\]\])',
    r"[mn]\d+ --> [mn]\d+",
    r"classDef \w+ fill:#\w{6},stroke:#\w{6},color:#\w{6}(?:,stroke-dasharray:4 3)?",
    r"class [mn]\d+(?:,[mn]\d+)* \w+",
    r"style n\d+ fill:#[0-9a-f]{6},color:#[0-9a-f]{6}",
)


def chart(found: Drawing, **options: object) -> tuple[dict[str, str], list[tuple[str, ...]]]:
    """The labels and the edges of a flowchart of which every line is a statement."""
    text = render(found, Options(**options))  # type: ignore[arg-type]
    lines = [line.strip() for line in text.splitlines()]
    assert [line for line in lines if not any(re.fullmatch(rule, line) for rule in _STATEMENTS)] == []
    assert lines.count("end") == sum(line.startswith("subgraph") for line in lines)
    declared = re.findall(r'^ *(?:subgraph )?([mn]\d+)[\[(]+"(.*?)"[\])]+$', text, re.MULTILINE)
    assert len(dict(declared)) == len(declared)
    named = [name for names in re.findall(r"^ *class (\S+)", text, re.MULTILINE) for name in names.split(",")]
    assert sorted(named) == sorted(dict(declared))
    return dict(declared), re.findall(r"(\w+) --> (\w+)", text)


@pytest.mark.parametrize("options", [{}, {"heat": "angle"}, {"depth": 0}, {"depth": 3}], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_every_line_is_a_statement_and_every_edge_joins_two_boxes(name: str, options: dict[str, object]) -> None:
    labels, edges = chart(drawing(name), **options)
    assert max(Counter(edges).values(), default=1) == 1
    assert {end for edge in edges for end in edge} <= set(labels)


@pytest.mark.parametrize(("depth", "modules"), [(0, 0), (1, 3), (2, 10)])
def test_a_depth_opens_modules(depth: int, modules: int) -> None:
    labels, _ = chart(drawing("resnet"), depth=depth)
    assert sum(name.startswith("m") for name in labels) == modules


def test_hostile_names_are_read_as_they_are() -> None:
    labels, _ = chart(drawing("hostile, in Python"))
    names = [label.partition("<br/>")[0] for label in labels.values()]
    read = {re.sub(r"#(\d+);", lambda found: chr(int(found[1])), name) for name in names}
    for name in ("<script>alert(1)</script>", "a&b", "&lt;", "%%{init: {'theme': 'dark'}}%%", "#quot;", "日本", "end"):
        assert name in read
    text = "".join(map(chr, range(0x20, 0x7F)))
    assert not set("\"`<>&#;%{}[]|:\\~^$@!?*'") & set(re.sub(r"#\d+;", "", escape(text)))


def long(modules: int) -> nn.Sequential:
    """A chain in modules of ten layers, all of them different."""
    widths = [[4 + 5 * place + step for step in range(5)] for place in range(modules)]
    return nn.Sequential(
        *(nn.Sequential(*(part for w in own for part in (nn.Linear(4, w), nn.Linear(w, 4)))) for own in widths)
    )


def test_more_edges_than_github_draws_are_refused_with_the_depth_that_fits() -> None:
    found = drawing_of(long(60))
    gives = r"`depth=3` gives [\d,]+ edges and [\d,]+ characters; GitHub draws at most 500 edges and 50,000 characters"
    with pytest.raises(hra_fx.VisualizeError, match=rf"{gives}\. `depth=0` fits\."):
        render(found, Options(depth=3))
    for depth in (None, 0):
        assert len(render(found, Options(depth=depth))) <= CHARACTERS
        assert len(chart(found, depth=depth)[1]) <= EDGES


def test_a_text_that_no_depth_makes_short_enough_is_refused() -> None:
    model = nn.Sequential(*(nn.Linear(4 + i % 2, 4 + (i + 1) % 2) for i in range(600)))
    with pytest.raises(hra_fx.VisualizeError, match=r"The smallest Mermaid text has 601 edges .* as `focus`"):
        render(drawing_of(model), Options())
