"""Build a model from its `config.json` alone, with placeholder weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hra_fx.cli.model_factories import ModelFactory, factory_for
from hra_fx.cli.placeholder_weights import use_placeholders
from hra_fx.errors import CheckpointError, HRAWarning

CONFIG = "config.json"
_PIPELINE = "model_index.json"
#: Quantization methods whose layers can be adapted, by their names in transformers.
_QUANTIZED = ("bitsandbytes", "torchao")
_EXPECTED = "Give the folder of a transformers, diffusers or timm model."


@dataclass(frozen=True)
class Built:
    """A model in eval mode.

    Attributes:
        model: the model.
        library: the library that it is from.
    """

    model: nn.Module
    library: str


def build(path: Path) -> Built:
    """Build the model of a folder, or of a `config.json`, with the tensors of `use_placeholders`.

    Raises:
        CheckpointError: there is no such file, or no installed library knows the model.
    """
    file, factory = _factory(path)
    _warn_if_quantized(file)
    try:
        with torch.device("meta"):
            model = factory.make()
        return Built(use_placeholders(model).eval(), factory.library)
    # An unusual configuration may raise anything in the constructors of hundreds of models.
    except Exception as error:
        raise CheckpointError(f"{file}: {factory.library} cannot build the model ({_reason(error)}).") from error


def load(path: Path) -> Built:
    """Load the model of a folder with its weights; raises the errors of `build`."""
    file, factory = _factory(path)
    try:
        return Built(factory.load().eval(), factory.library)
    except Exception as error:
        raise CheckpointError(f"{file.parent}: {factory.library} cannot load the model ({_reason(error)}).") from error


def _factory(path: Path) -> tuple[Path, ModelFactory]:
    file = path / CONFIG if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        if (path / _PIPELINE).is_file():
            parts = sorted(found.parent.name for found in path.glob(f"*/{CONFIG}"))
            raise CheckpointError(f"{path}: is a diffusers pipeline. Give one of its parts: {', '.join(parts)}.")
        raise CheckpointError(f"{file}: no such file. {_EXPECTED}")
    return file, factory_for(file, _entries(file))


def _warn_if_quantized(file: Path) -> None:
    """The model is built with its layers before quantization, which some libraries replace by their own."""
    given = _entries(file).get("quantization_config")
    method = given.get("quant_method") if isinstance(given, dict) else None
    if method is not None and method not in _QUANTIZED:
        warnings.warn(
            f"{file}: the weights are quantized by {method}, and the layers before quantization are shown. "
            f"hra_fx.transform supports quantized layers of {' and '.join(_QUANTIZED)}.",
            HRAWarning,
            stacklevel=3,
        )


def _entries(file: Path) -> Mapping[str, Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read the file ({error.strerror}). {_EXPECTED}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON ({error}). {_EXPECTED}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: must be a JSON object, got a {type(entries).__name__}. {_EXPECTED}")
    return entries


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
