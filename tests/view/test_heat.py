"""The values and the scale of a heatmap."""

from __future__ import annotations

import dataclasses
import math

import pytest
from drawn_models import drawing, drawn
from hypothesis import example, given, strategies as st

import hra_fx
from hra_fx.reporting.heat import HEATS, heat_of, scale
from hra_fx.view.heatmap import heatmap_of


@given(st.lists(st.floats(0, 1e9), min_size=1))
@example([5e-324])
def test_a_scale_is_round_and_holds_all_values(values: list[float]) -> None:
    bottom, top = scale(values)
    low, high = min(values), max(values)
    assert bottom <= low * (1 + 1e-5) and top >= high * (1 - 1e-5)
    if high - low > 1e-2 * high and high > 1e-200:
        assert (top - bottom) <= 1.5 * (high - low), "it fits the values"
    else:
        assert bottom <= low <= high * (1 + 1e-6) <= max(top * (1 + 1e-5), 1.0)


def test_the_heat_is_that_of_the_report() -> None:
    rows = hra_fx.report(drawn("resnet")).rows
    for name in HEATS:
        factor = {"mean_angle": 180 / math.pi, "angle": 180 / math.pi, "rotation": 1}.get(name, 100)
        values = heat_of(rows, name)
        assert values == {row.path: pytest.approx(factor * getattr(row, name)) for row in rows}


def test_of_several_adapters_the_largest_counts_and_what_is_unknown_stays_so() -> None:
    row = hra_fx.report(drawn("one layer")).rows[0]
    three = [dataclasses.replace(row, adapter=str(value), rotation=value) for value in (1.0, 3.0, 2.0)]
    assert heat_of(three, "rotation") == {"0": 3.0}
    unknown = [*three, dataclasses.replace(row, rotation=math.nan)]
    assert math.isnan(heat_of(unknown, "rotation")["0"])
    assert math.isnan(heat_of(unknown[::-1], "rotation")["0"])


def test_a_layer_without_an_active_adapter_has_no_heat() -> None:
    rows = [dataclasses.replace(row, active=False) for row in hra_fx.report(drawn("one layer")).rows]
    assert all(heat_of(rows, name) == {"0": 0.0} for name in HEATS)


def test_the_default_is_the_change_of_the_weight() -> None:
    rotated_model = drawing("resnet")
    row = dataclasses.replace(rotated_model.rows[0], angles=(0.1,), weight_change=0.02, mean_angle=0.1)
    shown = heatmap_of(dataclasses.replace(rotated_model, rows=(row,)), None)
    assert (shown.name, shown.values) == ("weight_change", {row.path: pytest.approx(2.0)})
    without_weight = dataclasses.replace(row, weight_change=math.nan)
    assert heatmap_of(dataclasses.replace(rotated_model, rows=(without_weight,)), None).name == "mean_angle"
    fresh = dataclasses.replace(row, angles=())
    assert not heatmap_of(dataclasses.replace(rotated_model, rows=(fresh,)), None).values
