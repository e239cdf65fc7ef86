"""A model from its `config.json` alone: its layers have names and shapes, and its weights no memory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hra_fx.cli.model_factories import Recipe, recipe_of
from hra_fx.cli.placeholder_weights import hollow
from hra_fx.errors import CheckpointError, HRAWarning

CONFIG = "config.json"
_PIPELINE = "model_index.json"
#: Whose quantised layers can be adapted, as transformers calls them.
_QUANTISED = ("bitsandbytes", "torchao")
_DUE = "Give the folder of a model of transformers, diffusers or timm."


@dataclass(frozen=True)
class Built:
    """A model in eval mode.

    Attributes:
        model: the model.
        library: whose it is.
    """

    model: nn.Module
    library: str


def build(path: Path) -> Built:
    """Build the model of a folder, or of a `config.json`; see `hollow` for its tensors.

    Raises:
        CheckpointError: there is no such file, or no installed library knows its model.
    """
    file, recipe = _recipe(path)
    _warn_of_quantised(file)
    try:
        with torch.device("meta"):
            model = recipe.make()
        return Built(hollow(model).eval(), recipe.library)
    # Whatever an unusual configuration meets in the constructors of hundreds of models.
    except Exception as error:
        raise CheckpointError(f"{file}: {recipe.library} cannot build its model ({_reason(error)}).") from error


def load(path: Path) -> Built:
    """Load the model of a folder, with its weights; errors as those of `build`."""
    file, recipe = _recipe(path)
    try:
        return Built(recipe.load().eval(), recipe.library)
    except Exception as error:
        raise CheckpointError(f"{file.parent}: {recipe.library} cannot load its model ({_reason(error)}).") from error


def _recipe(path: Path) -> tuple[Path, Recipe]:
    file = path / CONFIG if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        if (path / _PIPELINE).is_file():
            parts = sorted(found.parent.name for found in path.glob(f"*/{CONFIG}"))
            raise CheckpointError(f"{path}: is a pipeline of diffusers. Give one of its parts: {', '.join(parts)}.")
        raise CheckpointError(f"{file}: there is no such file. {_DUE}")
    return file, recipe_of(file, _entries(file))


def _warn_of_quantised(file: Path) -> None:
    """What is built has the layers from before quantisation, which other libraries put their own in place of."""
    given = _entries(file).get("quantization_config")
    method = given.get("quant_method") if isinstance(given, dict) else None
    if method is not None and method not in _QUANTISED:
        warnings.warn(
            f"{file}: its weights are quantised by {method}, and this is of the model before that. hra_fx.transform "
            f"takes quantised layers of {' and '.join(_QUANTISED)}.",
            HRAWarning,
            stacklevel=3,
        )


def _entries(file: Path) -> Mapping[str, Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}). {_DUE}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON ({error}). {_DUE}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(entries).__name__}, a configuration is an object. {_DUE}")
    return entries


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
