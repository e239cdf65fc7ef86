"""Create a model from its `config.json`, on the meta device or with its weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hra_fx.checkpoint.disk.architecture import CONFIG, LIBRARIES
from hra_fx.checkpoint.disk.arguments import PIPELINE
from hra_fx.errors import CheckpointError, HRAWarning

#: Quantization methods whose layers can be adapted, by their names in transformers.
_QUANTIZED = ("bitsandbytes", "torchao")
_EXPECTED = "Give the folder of a transformers, diffusers or timm model."


def build(path: Path, *, weights: bool = False) -> tuple[nn.Module, str]:
    """The model of a folder or a `config.json`, in eval mode, and the name of its library.

    Args:
        path: the folder or file.
        weights: whether to load the weights. Otherwise the model is on the meta device.

    Raises:
        CheckpointError: the file is missing, its model type is unknown, or the model cannot be built or loaded.
    """
    file = path / CONFIG if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        if (path / PIPELINE).is_file():
            parts = sorted(found.parent.name for found in path.glob(f"*/{CONFIG}"))
            raise CheckpointError(f"{path}: is a diffusers pipeline. Give one of its parts: {', '.join(parts)}.")
        raise CheckpointError(f"{file}: no such file. {_EXPECTED}")
    entries = _entries(file)
    key = next((key for key in LIBRARIES if entries.get(key)), None)
    if key is None:
        raise CheckpointError(f"{file}: has none of the keys {', '.join(LIBRARIES)}. {_EXPECTED}")
    library, create = LIBRARIES[key]
    if find_spec(library) is None:
        raise CheckpointError(f"{file}: {library} is not installed. Run: pip install {library}.")
    if not weights:
        _warn_if_quantized(file, entries)
    try:
        if weights:
            return create(file, entries, True).eval(), library
        with torch.device("meta"):
            return create(file, entries, False).eval(), library
    except CheckpointError:
        raise
    # An unusual configuration may raise anything in the constructors of hundreds of models.
    except Exception as error:
        what = f"{file.parent}: {library} cannot load" if weights else f"{file}: {library} cannot build"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(f"{what} the model ({reason}).") from error


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


def _warn_if_quantized(file: Path, entries: Mapping[str, Any]) -> None:
    """The model is built with its layers before quantization, which some libraries replace by their own."""
    given = entries.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, dict) else None
    if method is not None and method not in _QUANTIZED:
        warnings.warn(
            f"{file}: the weights are quantized by {method}, but the layers before quantization are shown. "
            f"hra_fx.transform supports quantized layers of {' and '.join(_QUANTIZED)}.",
            HRAWarning,
            stacklevel=3,
        )
