"""Mermaid text, read by a small grammar of its own: the part of the language that GitHub draws and that is written."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from drawn_models import MAKERS, Residual, drawing
from torch import Tensor, nn

import hra_fx
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.mermaid import CHARACTERS, EDGES, escape, render
from hra_fx.view.opening import Options

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


def test_a_skip_edge_is_seen() -> None:
    model = hra_fx.transform(nn.Sequential(Residual(), nn.Tanh()), hra_fx.HRAConfig(r=2, target_modules=["fc1"]))
    labels, edges = chart(drawing_of(model), depth=1)
    named = [tuple(labels[end].partition("<br/>")[0] for end in edge) for edge in edges]
    assert ("input", "fc1") in named and ("input", "add") in named


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
    found = drawing_of(Long(60))
    gives = r"`depth=3` gives [\d,]+ edges and [\d,]+ characters; GitHub draws at most 500 edges and 50,000 characters"
    with pytest.raises(hra_fx.VisualizeError, match=rf"{gives}\. `depth=1` fits\."):
        render(found, Options(depth=3))
    for depth in (None, 1):
        assert len(render(found, Options(depth=depth))) <= CHARACTERS
        assert len(chart(found, depth=depth)[1]) <= EDGES


def test_a_text_that_no_depth_makes_short_enough_is_refused() -> None:
    model = nn.Sequential(*(nn.Linear(4 + i % 2, 4 + (i + 1) % 2) for i in range(600)))
    with pytest.raises(hra_fx.VisualizeError, match=r"The smallest Mermaid text has 601 edges .* as `focus`"):
        render(drawing_of(model), Options())
