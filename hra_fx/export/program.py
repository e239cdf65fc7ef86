"""Recognize exported programs, which cannot be adapted."""

from __future__ import annotations

from hra_fx.compat import loaded_class
from hra_fx.errors import AdapterError


def is_program(value: object) -> bool:
    """Whether a value is a `torch.export.ExportedProgram`. This does not import torch.export."""
    return isinstance(value, loaded_class("torch.export", "ExportedProgram"))


def refuse_program(model: object) -> None:
    """Raise an error for an exported program, whose operators read parameters without calls of layers."""
    if is_program(model):
        raise AdapterError(
            "`model` is an ExportedProgram. Adapt the model before torch.export: hra_fx.transform(model, config)."
        )
