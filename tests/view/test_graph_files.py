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
from hra_fx.view.network import collapsed, escape, network, render_dot, render_graphml, render_mermaid
from hra_fx.view.opening import Options

OPTIONS = [Options(heat="mean_angle"), Options(depth=0, heat="share")]
_TOKEN = re.compile(r'\s+|"(?:[^"\\]|\\.)*"|->|[{}\[\];=,]|\w[\w.]*')


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_dot_and_graphml_have_every_box_and_every_edge_once(name: str, options: Options) -> None:
    text = render_dot(drawing(name), options)
    words = [word for word in _TOKEN.findall(text) if word.strip()]
    assert "".join(_TOKEN.findall(text)) == text, "nothing but tokens"
    part = collapsed(drawing(name), options.depth)
    names = {key: f"n{index}" for index, key in enumerate(part.picture)}
    declared = [word for word, after in pairwise(words) if after == "[" and word[1:].isdigit()]
    assert sorted(declared) == sorted(names.values())
    ends = [(words[i - 1], words[i + 1]) for i, word in enumerate(words) if word == "->"]
    assert sorted(ends) == sorted((names[a], names[b]) for a, b in part.picture.edges)

    read, wanted = nx.parse_graphml(render_graphml(drawing(name), options).decode("utf-8")), network(part)
    for _, data in read.nodes(data=True):
        assert ("adapted_layers" in data) is (data.pop(f"heat_{options.heat}", None) is not None)
    assert dict(read.nodes(data=True)) == dict(wanted.nodes(data=True))
    assert (list(read.edges), list(read)) == (list(wanted.edges), list(wanted))
    assert read.graph.items() >= wanted.graph.items()


def test_graphml_is_the_graph_of_to_networkx_with_the_heat() -> None:
    text = render_graphml(drawing("resnet"), Options(heat="mean_angle")).decode("utf-8")
    read, graph = nx.parse_graphml(text), hra_fx.to_networkx(drawn("resnet"))
    for key, data in graph.nodes(data=True):
        heat = {"heat_mean_angle": pytest.approx(math.degrees(data["mean_angle"]))} if "mean_angle" in data else {}
        assert read.nodes[key] == data | heat


def test_dot_has_modules_and_the_reasons_of_skipped_layers() -> None:
    assert 'label="layer2.1 · BasicBlock"' in render_dot(drawing("resnet"), Options())
    text = render_dot(drawing("llama"), Options())
    assert sum("has no adapter: " in line for line in text.split("\n")) == 10


@pytest.mark.parametrize("name", ["resnet", "bert", "shared", "attention"])
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
    rf'n\d+(?:\["{_TEXT}"\]|\(\["{_TEXT}"\]\)|\[\["{_TEXT}"\]\]):::\w+',
    r"[mn]\d+ --> [mn]\d+",
    r"classDef \w+ fill:#\w{6},stroke:#\w{6},color:#\w{6}(?:,stroke-dasharray:4 3)?",
    r"class m\d+ \w+",
    r"style n\d+ fill:#[0-9a-f]{6},color:#[0-9a-f]{6}",
)


def chart(found: Drawing, **options: object) -> tuple[dict[str, str], list[tuple[str, ...]]]:
    """The labels and the edges of a flowchart of which every line is a statement."""
    text = render_mermaid(found, Options(**options))  # type: ignore[arg-type]
    lines = [line.strip() for line in text.splitlines()]
    assert [line for line in lines if not any(re.fullmatch(rule, line) for rule in _STATEMENTS)] == []
    assert lines.count("end") == sum(line.startswith("subgraph") for line in lines)
    declared = re.findall(r'^ *(?:subgraph )?([mn]\d+)[\[(]+"(.*?)"[\])]+(?::::\w+)?$', text, re.MULTILINE)
    assert len(dict(declared)) == len(declared)
    classes = set(re.findall(r"^ *classDef (\w+)", text, re.MULTILINE))
    assert set(re.findall(r"(?:^ *class m\d+ |:::)(\w+)$", text, re.MULTILINE)) <= classes
    return dict(declared), re.findall(r"(\w+) --> (\w+)", text)


@pytest.mark.parametrize("options", [{}, {"heat": "angle"}, {"depth": 0}, {"depth": 3}], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_every_line_is_a_statement_and_every_edge_joins_two_boxes(name: str, options: dict[str, object]) -> None:
    labels, edges = chart(drawing(name), **options)
    assert max(Counter(edges).values(), default=1) == 1
    assert {end for edge in edges for end in edge} <= set(labels)


def test_hostile_names_are_read_as_they_are_and_a_depth_opens_modules() -> None:
    labels, _ = chart(drawing("hostile, in Python"))
    names = [label.partition("<br/>")[0] for label in labels.values()]
    read = {re.sub(r"#(\d+);", lambda found: chr(int(found[1])), name) for name in names}
    for name in ("<script>alert(1)</script>", "a&b", "&lt;", "%%{init: {'theme': 'dark'}}%%", "#quot;", "日本", "end"):
        assert name in read
    text = "".join(map(chr, range(0x20, 0x7F)))
    assert not set("\"`<>&#;%{}[]|:\\~^$@!?*'") & set(re.sub(r"#\d+;", "", escape(text)))
    for depth, modules in ((0, 0), (1, 3), (2, 10)):
        labels, _ = chart(drawing("resnet"), depth=depth)
        assert sum(name.startswith("m") for name in labels) == modules


def test_a_text_that_github_does_not_draw_is_refused() -> None:
    model = nn.Sequential(*(nn.Linear(4 + i % 2, 4 + (i + 1) % 2) for i in range(600)))
    with pytest.raises(hra_fx.VisualizeError, match=r"^The Mermaid text has 601 edges and .* at most 500 .*`focus`"):
        render_mermaid(drawing_of(model), Options())
