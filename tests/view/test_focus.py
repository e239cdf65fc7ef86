"""A module by itself, and the values that enter and leave it."""

from __future__ import annotations

import networkx as nx
import pytest
from drawn_models import drawing

from hra_fx.view.drawing import Drawing
from hra_fx.view.focus import focused
from hra_fx.view.tree import Leaf, Scope


def leaves(drawing: Drawing) -> dict[str, Leaf]:
    return {key: data["leaf"] for key, data in drawing.picture.nodes(data=True)}


def ports(drawing: Drawing) -> list[str]:
    return [leaf.name for leaf in leaves(drawing).values() if leaf.kind in ("input", "output")]


def test_a_focus_shows_what_enters_and_leaves() -> None:
    part = focused(drawing("resnet"), "layer2")
    assert ports(part) == ["from layer1.1.relu", "to layer3.0.conv1 + 1"]
    assert part.title == "layer2 in ResNet with HRA"
    assert part.facts.startswith("5 of 21 adapted layers · ")
    assert {row.path for row in part.rows} == {path for leaf in leaves(part).values() for path in leaf.marks}
    assert nx.is_directed_acyclic_graph(part.picture)


def test_a_focus_is_the_root() -> None:
    tree = focused(drawing("resnet"), "layer2").tree()
    assert not tree.eager
    assert [item.name for item in tree.items] == ["from layer1.1.relu", "layer2.0", "layer2.1", "to layer3.0.conv1 + 1"]
    assert tree.edges == ((0, 1), (1, 2), (2, 3))


@pytest.mark.parametrize("focus", ["block", "block.fc1"])
def test_all_calls_of_a_shared_module_are_shown(focus: str) -> None:
    part = focused(drawing("shared"), focus)
    assert sum(leaf.target == "block.fc1" for leaf in leaves(part).values()) == 3
    assert nx.is_directed_acyclic_graph(part.picture)
    assert isinstance(part.tree(), Scope)


def test_a_part_that_stays_python_has_no_ports() -> None:
    part = focused(drawing("bert"), "encoder.layer.1")
    assert ports(part) == []
    assert part.tree().eager
    assert len(part.rows) == 6


def test_a_layer_may_be_focused_on() -> None:
    part = focused(drawing("resnet"), "fc")
    assert [leaf.name for leaf in leaves(part).values()] == ["from flatten", "fc", "to output"]


@pytest.mark.parametrize("focus", [None, ""])
def test_no_focus_is_the_model(focus: str | None) -> None:
    found = drawing("shared")
    assert focused(found, focus) is found
