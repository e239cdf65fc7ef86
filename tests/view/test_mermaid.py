"""Mermaid text, read by a small grammar of its own: the part of the language that GitHub draws and that is written."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import pytest
from drawn_models import MAKERS, Residual, drawing, drawn
from torch import Tensor, nn

import hra_fx
from hra_fx.view.drawing import drawing_of
from hra_fx.view.mermaid import CHARACTERS, EDGES, escape, render
from hra_fx.view.options import Options

_NODE = re.compile(r'(n\d+)(?:\["([^"]*)"\]|\(\["([^"]*)"\]\)|\[\["([^"]*)"\]\])')
_LINES = {
    "comment": re.compile(r"%% [^%{}]*"),
    "open": re.compile(r'subgraph (m\d+)\["([^"]*)"\]'),
    "close": re.compile(r"end"),
    "dot": re.compile(r"(p\d+)\(\( \)\)"),
    "edge": re.compile(r"([mnp]\d+) --> ([mnp]\d+)"),
    "look": re.compile(r"classDef (\w+) fill:#\w{6},stroke:#\w{6},color:#\w{6}(?:,stroke-dasharray:4 3)?"),
    "class": re.compile(r"class ([mnp]\d+(?:,[mnp]\d+)*) (\w+)"),
    "style": re.compile(r"style (n\d+) fill:#[0-9a-f]{6},color:#[0-9a-f]{6}"),
}
#: Between two `<br/>` of a label: nothing that means anything to Mermaid or HTML, but numbers of characters.
_LABEL = re.compile(r"(?:[A-Za-z0-9 ._/,()=+-]|#\d+;|[^\x00-\xa0])*")


@dataclass
class Flowchart:
    labels: dict[str, str] = field(default_factory=dict)
    inside: dict[str, tuple[str, ...]] = field(default_factory=dict)  # node -> the subgraphs around it
    edges: list[tuple[str, str]] = field(default_factory=list)
    looks: dict[str, str] = field(default_factory=dict)


def parsed(text: str) -> Flowchart:
    """The flowchart, or a failure at the first line that is no part of the grammar."""
    first, *lines = text.rstrip("\n").split("\n")
    assert first == "flowchart TD"
    chart, around, looks = Flowchart(), [], set()
    for line in map(str.strip, lines):
        if found := _NODE.fullmatch(line):
            _declare(chart, found[1], next(label for label in found.groups()[1:] if label is not None), around)
            continue
        kind, found = next(
            ((kind, found) for kind, rule in _LINES.items() if (found := rule.fullmatch(line))), ("", None)
        )
        assert found is not None, f"no statement: {line}"
        if kind == "open":
            _declare(chart, found[1], found[2], around)
            around.append(found[1])
        elif kind == "close":
            around.pop()
        elif kind == "dot":
            _declare(chart, found[1], "", around)
        elif kind == "edge":
            chart.edges.append((found[1], found[2]))
        elif kind == "look":
            looks.add(found[1])
        elif kind == "class":
            assert found[2] in looks
            chart.looks.update((name, found[2]) for name in found[1].split(","))
    assert around == []
    return chart


def _declare(chart: Flowchart, name: str, label: str, around: list[str]) -> None:
    assert name not in chart.labels
    assert all(_LABEL.fullmatch(part) for part in label.split("<br/>")), label
    chart.labels[name] = label
    chart.inside[name] = tuple(around)


def text_of(model: nn.Module, **options: object) -> str:
    return render(drawing_of(model), Options(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"heat": "angle"}, {"depth": 0}, {"depth": 3}], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_every_line_is_a_statement_and_every_edge_joins_two_boxes(name: str, options: dict[str, object]) -> None:
    chart = parsed(render(drawing(name), Options(**options)))  # type: ignore[arg-type]
    assert chart.looks.keys() == chart.labels.keys()
    assert max(Counter(chart.edges).values(), default=1) == 1
    for source, target in chart.edges:
        assert source in chart.labels
        assert target in chart.labels
        assert source not in chart.inside[target]
        assert target not in chart.inside[source]


def test_a_skip_edge_is_seen() -> None:
    chart = parsed(text_of(hra_fx.transform(nn.Sequential(Residual(), nn.Tanh()).eval(), config("fc1")), depth=1))
    dot = next(name for name in chart.labels if name.startswith("p"))
    add = next(name for name, label in chart.labels.items() if label == "add")
    assert (dot, add) in chart.edges
    assert len([edge for edge in chart.edges if edge[0] == dot]) == 2


def config(*targets: str) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(r=2, target_modules=list(targets))


@pytest.mark.parametrize(("depth", "modules"), [(0, 0), (1, 3), (2, 10)])
def test_a_depth_opens_modules(depth: int, modules: int) -> None:
    chart = parsed(text_of(drawn("resnet"), depth=depth))
    assert sum(name.startswith("m") for name in chart.labels) == modules


def test_hostile_names_are_read_as_they_are() -> None:
    chart = parsed(text_of(drawn("hostile, in Python")))
    labels = {label.partition("<br/>")[0] for label in chart.labels.values()}
    read = {re.sub(r"#(\d+);", lambda found: chr(int(found[1])), label) for label in labels}
    for name in ("<script>alert(1)</script>", "a&b", "&lt;", "%%{init: {'theme': 'dark'}}%%", "#quot;", "日本", "end"):
        assert name in read


class Long(nn.Module):
    """A chain in modules of ten layers, all of them different."""

    def __init__(self, modules: int) -> None:
        super().__init__()
        self.part = nn.ModuleList(
            nn.Sequential(*(nn.Linear(4 + (7 * i + j) % 5, 4 + (7 * i + j + 1) % 5) for j in range(10)))
            for i in range(modules)
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in self.part:
            x = part(x[..., :1].expand(*x.shape[:-1], part[0].in_features))
        return x


def test_more_edges_than_github_draws_are_refused_with_the_depth_that_fits() -> None:
    drawing = drawing_of(Long(60))
    with pytest.raises(
        hra_fx.VisualizeError,
        match=rf"`depth=3` gives 540 edges and [\d,]+ characters; GitHub draws at most {EDGES} edges and "
        r"50,000 characters\. `depth=1` fits\.",
    ):
        render(drawing, Options(depth=3))
    for depth in (None, 1):
        text = render(drawing, Options(depth=depth))
        assert len(text) <= CHARACTERS
        assert len(parsed(text).edges) <= EDGES


def test_a_text_that_no_depth_makes_short_enough_is_refused() -> None:
    names = [f"layer_{'long' * 10}_{i}" for i in range(600)]
    model = nn.Sequential()
    for i, name in enumerate(names):
        model.add_module(name, nn.Linear(4 + i % 2, 4 + (i + 1) % 2))
    drawing = drawing_of(model)
    with pytest.raises(hra_fx.VisualizeError, match=r"The smallest Mermaid text has 601 edges .* as `focus`"):
        render(drawing, Options())


def test_escapes_are_numbers_of_characters() -> None:
    for code in range(0x20, 0x7F):
        letter = chr(code)
        assert escape(letter) in (letter, f"#{code};")
    assert not set("\"`<>&#;%{}[]|:\\~^$@!?*'") & set(
        re.sub(r"#\d+;", "", escape("".join(map(chr, range(0x20, 0x7F)))))
    )
