"""One cell of the table: a model in one form, through one exporter, against the adapted model in PyTorch."""

from __future__ import annotations

import functools

import torch
from export.exporting.exporters import EXPORTERS
from export.exporting.models import CALLED_AT, EXPORTED_AT, MODELS
from torch import Tensor
from torch.export import ExportedProgram

import hra_fx

FORMS = ("folded", "lowered", "frozen")
LIMIT = 1e-5


@functools.cache
def expected(name: str) -> Tensor:
    """What the adapted model gives, in PyTorch."""
    with torch.no_grad():
        result: Tensor = MODELS[name].adapted()(*MODELS[name].inputs(*CALLED_AT[name]))
    return result


@functools.cache
def moved(name: str) -> float:
    """How far the adapter moves an output, so that a runtime that lost it would be seen."""
    whole = MODELS[name].adapted()
    with torch.no_grad(), hra_fx.disable_adapters(whole.model):
        return distance(whole(*MODELS[name].inputs(*CALLED_AT[name])), expected(name))


@functools.cache
def program(name: str, form: str, dynamic: bool) -> ExportedProgram:
    """A model in one form, for every batch and length, or for those of the call."""
    model = MODELS[name]
    whole = model.folded() if form == "folded" else model.adapted()
    inputs = model.inputs(*(EXPORTED_AT if dynamic else CALLED_AT)[name])
    made = torch.export.export(whole, inputs, dynamic_shapes=(model.dynamic,) if dynamic else None)
    return hra_fx.freeze(made) if form == "frozen" else made


def distance(actual: Tensor, wanted: Tensor) -> float:
    """The largest difference, of numbers whose largest is 1 or less, else relative to that."""
    assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
    return float((actual - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))


def error_of(name: str, form: str, exporter: str) -> float:
    """How far the runtime's outputs are from PyTorch's."""
    way = EXPORTERS[exporter]
    with torch.no_grad():
        actual = way.run(program(name, form, way.dynamic), MODELS[name].inputs(*CALLED_AT[name]))
    return distance(actual, expected(name))
