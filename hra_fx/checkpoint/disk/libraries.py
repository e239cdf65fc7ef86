"""The libraries that a `config.json` may be of, and how each creates its models. Code next to it is never run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hra_fx.errors import CheckpointError

#: Otherwise transformers asks on the terminal whether to run code next to a configuration.
_LOCAL_ONLY = {"local_files_only": True, "trust_remote_code": False}


def _from_transformers(file: Path, entries: Mapping[str, Any], weights: bool) -> nn.Module:
    transformers = importlib.import_module("transformers")
    given = entries.get("architectures")
    names = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    kind: Any = next((found for name in names if (found := getattr(transformers, name, None))), None)
    # From this file, which may be one of several in its folder.
    config = transformers.AutoConfig.from_pretrained(str(file), **_LOCAL_ONLY)
    made: nn.Module
    if weights:
        transformers.utils.logging.disable_progress_bar()
        kind = kind or transformers.AutoModel
        made = kind.from_pretrained(file.parent, config=config, use_safetensors=True, **_LOCAL_ONLY)
    else:
        made = transformers.AutoModel.from_config(config) if kind is None else kind(config)
    return made


def _from_diffusers(file: Path, entries: Mapping[str, Any], weights: bool) -> nn.Module:
    kind: Any = getattr(importlib.import_module("diffusers"), str(entries["_class_name"]), None)
    if not hasattr(kind, "from_config"):
        raise CheckpointError(f"{file}: the installed diffusers has no model {entries['_class_name']!r}.")
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    made: nn.Module = kind.from_pretrained(file.parent, **options) if weights else kind.from_config(dict(entries))
    return made


def _from_timm(file: Path, entries: Mapping[str, Any], weights: bool) -> nn.Module:
    given = {key: entries[key] for key in ("num_classes", "global_pool") if key in entries}
    arguments = {**given, **(entries.get("model_args") or {})}
    made: nn.Module = importlib.import_module("timm").create_model(entries["architecture"], **arguments)
    if weights:
        importlib.import_module("timm.models").load_checkpoint(made, str(file.with_name("model.safetensors")))
    return made


#: Key that identifies a library's configuration -> name of the library, function that creates the model.
LIBRARIES: Mapping[str, tuple[str, Callable[[Path, Mapping[str, Any], bool], nn.Module]]] = {
    "model_type": ("transformers", _from_transformers),
    "_class_name": ("diffusers", _from_diffusers),
    "architecture": ("timm", _from_timm),
}


def build_empty(file: Path, entries: Mapping[str, Any]) -> nn.Module | None:
    """The model of a `config.json` on the meta device; `None` if no installed library can build it."""
    key = next((key for key in LIBRARIES if entries.get(key)), None)
    if key is None or find_spec(LIBRARIES[key][0]) is None:
        return None
    try:
        with torch.device("meta"):
            return LIBRARIES[key][1](file, entries, False)
    # An unusual configuration may raise anything in the constructors of hundreds of models.
    except Exception:
        return None
