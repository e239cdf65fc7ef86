"""The entries about the base model in an adapter's configuration, as PEFT writes them and as they are compared."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from hra_fx.config import HRAConfig
from hra_fx.errors import HRAWarning
from hra_fx.selection.origin import origin_of


def base_model_name(root: nn.Module, config: HRAConfig) -> str | None:
    """PEFT's `base_model_name_or_path`: as configured, or as transformers knows it."""
    return str(config.base_model_name_or_path or origin_of(root).name or "") or None


def auto_mapping(root: nn.Module, config: HRAConfig) -> dict[str, Any] | None:
    """PEFT's `auto_mapping`: the class of the base model, if it does not follow from a task type."""
    origin = origin_of(root)
    mapping = {"base_model_class": origin.class_name, "parent_library": origin.library}
    return config.auto_mapping or (None if config.task_type else mapping)


def compare_names(file: Path, config: HRAConfig, ours: object) -> None:
    """Warn if the base model of an adapter has another name than this one; folders differ from machine to machine.

    Args:
        file: the adapter's weights, for the message.
        config: the adapter's configuration.
        ours: name or folder of this model; not compared if it is empty or not a string.
    """
    theirs = config.base_model_name_or_path
    if theirs and isinstance(ours, str) and ours and _last(os.fspath(theirs)) != _last(ours):
        text = (
            f"{file}: the adapter was trained on {os.fspath(theirs)!r}, but this model is {ours!r}. Make sure that it "
            "has the same weights, without an adapter folded or merged into them."
        )
        warnings.warn(text, HRAWarning, stacklevel=5)


def _last(name: str) -> str:
    """The last part of a model's name, or of the name of its repository if this is a folder in the Hub's cache.

    >>> _last("org/tiny"), _last("models/tiny/"), _last("hub/models--org--tiny/snapshots/0123abc")
    ('tiny', 'tiny', 'tiny')
    """
    parts = Path(os.path.normpath(name)).parts
    return parts[-3].rpartition("--")[2] if parts[-2:-1] == ("snapshots",) and len(parts) > 2 else parts[-1]
