"""The options of a picture, and the errors of those that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
from drawn_models import Residual, drawing
from torch import nn

import hra_fx
from hra_fx.view.drawing import drawing_of
from hra_fx.view.focus import focused
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.opening import Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"depth": depth}, r"`depth` must be a non-negative int or None, got ")
            for depth in (-1, 1.0, True, "1", [1])
        ),
        *(
            (
                {"heat": heat},
                r"`heat` must be one of 'weight_change', 'mean_angle', 'angle', 'rotation', 'share', got ",
            )
            for heat in ("", 1, "off")
        ),
        ({"focus": nn.ReLU()}, r"`focus` must be a module's name as in model\.named_modules\(\), got ReLU\."),
    ],
)
def test_wrong_types_and_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(hra_fx.VisualizeError, match=f"^{message}"):
        Options(**options)


@pytest.mark.parametrize(
    ("name", "focus", "message"),
    [
        ("resnet", "layer5", r"no module 'layer5'; did you mean 'layer\d' or"),
        ("resnet", "layer3.0.conv9", r"no module 'layer3\.0\.conv9'; did you mean 'layer3\.0\.conv\d' or"),
        ("resnet", "backbone.fc", r"no module 'backbone\.fc'; did you mean 'fc'\?"),
        ("resnet", "zzz", r"no module 'zzz'\. See model\.named_modules\(\)"),
        (
            "bert",
            "embeddings.word_embeddings",
            r"is inside 'embeddings', which is drawn as one box\. Pass",
        ),
        ("bert", "encoder.layer.0.output.dropout", r"has no boxes, because it computes nothing that is drawn"),
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
