"""Which modules are open, within the budget; the options of a picture, and a module by itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torchvision
from drawn_models import Residual, drawing, leaves
from torch import nn

import hra_fx
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.html.rendering import render
from hra_fx.view.opening import Options, focused
from hra_fx.view.svg_file import render_svg


@cache
def large() -> Drawing:
    config = hra_fx.HRAConfig(r=2, target_modules=r".*(conv\d|downsample\.0)")
    return drawing_of(hra_fx.transform(torchvision.models.resnet50().eval(), config))


def test_repeats_are_one_box_and_a_page_is_small() -> None:
    text = render_svg(large(), Options())
    for shown in ("53 adapted layers", "layer3.1 … 5", "× 5"):
        assert shown in text
    assert len(render(large(), Options()).encode()) < 250_000


# ---- the options of a picture: their errors, and a module by itself with the values that enter and leave it ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"depth": depth}, "`depth` must be a non-negative int or None, got ") for depth in (-1, 1.0, True, "1")),
        *(({"heat": heat}, "`heat` must be one of 'weight_change', 'mean_angle', .*, got ") for heat in ("", 1, "off")),
        ({"theme": "sepia"}, r"`theme` must be one of 'light', 'dark', got 'sepia'\."),
        ({"focus": nn.ReLU()}, r"`focus` must be a module's name as in model\.named_modules\(\), got ReLU\."),
    ],
)
def test_wrong_types_and_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(hra_fx.VisualizeError, match=f"^{message}"):
        Options(**options)


@pytest.mark.parametrize(
    ("name", "focus", "message"),
    [
        ("resnet", "layer3.0.conv9", r"no module 'layer3\.0\.conv9'; did you mean 'layer3\.0\.conv\d' or"),
        ("resnet", "backbone.fc", r"no module 'backbone\.fc'; did you mean 'fc'\?"),
        ("resnet", "zzz", r"no module 'zzz'\. See model\.named_modules\(\)"),
        ("bert", "embeddings.word_embeddings", r"is inside 'embeddings', which is drawn as one box\. Pass"),
        ("bert", "encoder.layer.0.output.dropout", r"has no boxes, because nothing that it computes is drawn"),
    ],
)
def test_a_focus_without_boxes_names_other_modules(name: str, focus: str, message: str) -> None:
    with pytest.raises(hra_fx.VisualizeError, match=message):
        focused(drawing(name), focus)


def test_heat_needs_adapters() -> None:
    adapted = hra_fx.transform(nn.Sequential(Residual(), nn.Tanh()), hra_fx.HRAConfig(r=2, target_modules=["fc1"]))
    for part in (drawing_of(nn.Sequential(nn.Linear(4, 4))), focused(drawing_of(adapted), "1")):
        with pytest.raises(hra_fx.VisualizeError, match=r"^`heat` must be None for .*no adapters, got 'angle'"):
            heatmap_of(part, "angle")


def test_a_focus_is_the_root_with_what_enters_and_leaves() -> None:
    part = focused(drawing("resnet"), "layer2")
    assert part.title == "layer2 in ResNet with HRA"
    assert part.facts.startswith("5 of 21 adapted layers · ")
    assert {row.path for row in part.rows} == {path for leaf in leaves(part) for path in leaf.marks}
    tree = part.tree()
    assert [item.name for item in tree.items] == ["from layer1.1.relu", "layer2.0", "layer2.1", "to layer3.0.conv1 + 1"]
    assert tree.edges == ((0, 1, 0), (1, 2, 0), (2, 3, 0))
    assert [leaf.name for leaf in leaves(focused(drawing("resnet"), "fc"))] == ["from flatten", "fc", "to output"]
