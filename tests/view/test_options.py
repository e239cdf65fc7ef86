"""What can be asked of a picture, and what is said where it cannot be had."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from drawn_models import Residual, drawn
from torch import nn

import hra_fx
from hra_fx.view.drawing import drawing_of
from hra_fx.view.focus import focused
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.options import Options


@pytest.mark.parametrize("depth", [-1, 1.0, True, "1", [1]])
def test_a_depth_is_a_number_of_levels(depth: Any) -> None:
    with pytest.raises(hra_fx.VisualizeError, match=r"depth: .* is no number of levels\. Give 0"):
        Options(depth=depth)


def test_integers_of_numpy_are_numbers_too() -> None:
    assert Options(depth=numpy.int64(2)).depth == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("heat", ["color", "", 1, True])
def test_an_unknown_heat_is_refused_with_those_that_exist(heat: Any) -> None:
    with pytest.raises(hra_fx.VisualizeError, match=r"heat: .* is not one of 'mean_angle', 'angle', 'rotation', 'sh"):
        Options(heat=heat)


def test_a_focus_is_a_name() -> None:
    with pytest.raises(hra_fx.VisualizeError, match=r"focus: .*ReLU.* is ReLU, no name of a module"):
        Options(focus=nn.ReLU())  # type: ignore[arg-type]


def test_heat_needs_reflections() -> None:
    with pytest.raises(hra_fx.VisualizeError, match=r"heat: 'angle' shows what .* do, and Sequential has none"):
        heatmap_of(drawing_of(nn.Sequential(nn.Linear(4, 4))), "angle")


@pytest.mark.parametrize(
    ("name", "focus", "message"),
    [
        ("resnet", "layer5", r"no module 'layer5'; did you mean 'layer\d' or"),
        ("resnet", "layer3.0.conv9", r"no module 'layer3\.0\.conv9'; did you mean 'layer3\.0\.conv\d' or"),
        ("resnet", "backbone.fc", r"no module 'backbone\.fc'; did you mean 'fc'\?"),
        ("resnet", "zzz", r"no module 'zzz'\. Its children are 'conv1', 'bn1', 'relu' and 7 more\."),
        ("bert", "embeddings.word_embeddings", r"is a part of 'embeddings', which is drawn as one box"),
        ("bert", "encoder.layer.0.output.dropout", r"is a module of which nothing is drawn"),
    ],
)
def test_a_focus_that_cannot_be_drawn_is_told_what_could_be(name: str, focus: str, message: str) -> None:
    with pytest.raises(hra_fx.VisualizeError, match=message):
        focused(drawing_of(drawn(name)), focus)


def test_heat_of_a_focus_without_reflections_is_refused() -> None:
    model = hra_fx.transform(
        nn.Sequential(Residual(), nn.Linear(4, 2)).eval(), hra_fx.HRAConfig(r=2, target_modules=["fc1"])
    )
    with pytest.raises(hra_fx.VisualizeError, match=r"heat: 'angle' .* and 1 in Sequential with HRA has none"):
        heatmap_of(focused(drawing_of(model), "1"), "angle")
