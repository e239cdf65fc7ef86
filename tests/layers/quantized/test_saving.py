"""Adapters over quantized weights are saved, loaded and reported as over any; whole models as far as libraries go."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from layers.quantized.bases import (
    FEW,
    SCHEMES,
    adapted,
    config,
    inputs,
    int4,
    quantized,
    turn,
    values,
)
from oracles import dense_q
from reporting.made import oracle_share
from torch import Tensor, nn

import hra_fx

PLAIN_STATES = [name for name in FEW if name != "bnb nf4"]


@pytest.mark.parametrize("scheme", FEW)
def test_an_adapter_is_loaded_over_a_quantized_base(scheme: str, tmp_path: Path) -> None:
    model, x = adapted(scheme), inputs()
    hra_fx.save_adapter(model, tmp_path)
    loaded = hra_fx.load_adapter(quantized(scheme), tmp_path, is_trainable=True)
    assert torch.equal(loaded.train()(x), model.train()(x))
    empty = hra_fx.transform(quantized(scheme), config(), low_cpu_mem_usage=True)
    assert empty[0].hra_u["default"].is_meta
    hra_fx.load_adapter(empty, tmp_path, is_trainable=True)
    assert torch.equal(empty.train()(x), model(x))


@pytest.mark.parametrize("scheme", PLAIN_STATES)
def test_a_state_dict_goes_round(scheme: str) -> None:
    model, other = adapted(scheme), hra_fx.transform(quantized(scheme), config())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    # Python 3.11.2 pickles torchao's enumerations in a way that torch.load takes for code.
    other.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(other.train()(inputs()), model.train()(inputs()))


@pytest.mark.parametrize("scheme", ["bnb nf4", "ao int8 dynamic"])
def test_a_report_a_picture_and_a_graph(scheme: str, tmp_path: Path) -> None:
    model = adapted(scheme)
    rows = hra_fx.report(model).rows
    assert [(row.path, row.d, row.r) for row in rows] == [("0", 64, 4), ("2", 128, 4)]
    assert all(row.rotation > 1 for row in rows)
    hra_fx.visualize(model, tmp_path / "adapters.svg")
    assert (tmp_path / "adapters.svg").stat().st_size
    (graph,) = hra_fx.graphs(model).values()
    assert torch.equal(graph(inputs()), model(inputs()))


# ---- the share of a quantized weight that turns, against dense projectors in float64 ----


def turned(layer: Any, name: str = "default") -> Tensor:
    gram_schmidt = layer.hra_u.specs[name].apply_GS
    return dense_q(layer.hra_u[name].detach(), apply_GS=gram_schmidt, anchor=layer.hra_u.anchor(name))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_of_the_rounded_weight_and_changes_nothing(scheme: str) -> None:
    """The weights are chosen so that rounding shows: all of a row but one entry is lost in 8 bits, and more in 4."""
    base = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32))
    with torch.no_grad():
        for layer in (base[0], base[2]):
            layer.weight.mul_(1e-3)[:, 0] = 1.0
    model = hra_fx.transform(quantized(scheme, base), config(apply_GS=scheme in FEW))
    assert [row.share for row in hra_fx.report(model)] == [0.0, 0.0]
    turn(model)
    x = inputs()
    before, output = [values(model[0]), values(model[2])], model(x)
    rows = hra_fx.report(model).rows
    for row, layer, weight in zip(rows, (model[0], model[2]), before, strict=True):
        assert row.share == pytest.approx(oracle_share(weight, turned(layer)), rel=1e-5)
        assert torch.equal(values(layer), weight)
    assert torch.equal(model(x), output)


def test_after_evaluation_too() -> None:
    """Where a forward without gradients may have changed the layout of the weight."""
    for scheme in ("bnb nf4", "bnb fp4 nested", "bnb int8"):
        model = adapted(scheme)
        before = [row.share for row in hra_fx.report(model)]
        with torch.no_grad():
            model.eval()(inputs())
        assert [row.share for row in hra_fx.report(model)] == before


def test_what_no_kernel_can_read_is_not_a_number() -> None:
    model = hra_fx.transform(int4(), config("0"))
    turn(model)
    (row,) = hra_fx.report(model)
    assert math.isnan(row.share)
    assert row.angle > 0
