"""Create a model from its `config.json` with the library it belongs to. Code next to a checkpoint is never run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from hra_fx.errors import CheckpointError

#: Otherwise transformers asks on the terminal whether to run code next to a configuration.
_LOCAL_ONLY = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class ModelFactory:
    """Functions that create a model.

    Attributes:
        library: the library's name.
        make: creates it with arbitrary values.
        load: creates it with the weights next to its configuration.
    """

    library: str
    make: Callable[[], nn.Module]
    load: Callable[[], nn.Module]


def factory_for(file: Path, entries: Mapping[str, Any]) -> ModelFactory:
    """The factory for a configuration.

    Raises:
        CheckpointError: the library is unknown or not installed.
    """
    for key, (library, factory) in _FACTORIES.items():
        if entries.get(key):
            if find_spec(library) is None:
                raise CheckpointError(f"{file}: {library} is not installed. Run: pip install {library}.")
            return factory(file, entries)
    raise CheckpointError(
        f"{file}: unknown model type, there is no {', '.join(_FACTORIES)}. Give the folder of a transformers, "
        "diffusers or timm model."
    )


def _from_transformers(file: Path, entries: Mapping[str, Any]) -> ModelFactory:
    transformers = importlib.import_module("transformers")
    given = entries.get("architectures")
    names = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    kind: Any = next((found for name in names if (found := getattr(transformers, name, None))), None)

    def config() -> Any:
        # From this file, which may be one of several in its folder.
        return transformers.AutoConfig.from_pretrained(str(file), **_LOCAL_ONLY)

    def make() -> nn.Module:
        made: nn.Module = transformers.AutoModel.from_config(config()) if kind is None else kind(config())
        return made

    def load() -> nn.Module:
        transformers.utils.logging.disable_progress_bar()
        loaded: nn.Module = (kind or transformers.AutoModel).from_pretrained(
            file.parent, config=config(), use_safetensors=True, **_LOCAL_ONLY
        )
        return loaded

    return ModelFactory("transformers", make, load)


def _from_diffusers(file: Path, entries: Mapping[str, Any]) -> ModelFactory:
    kind: Any = getattr(importlib.import_module("diffusers"), str(entries["_class_name"]), None)
    if not hasattr(kind, "from_config"):
        raise CheckpointError(f"{file}: the installed diffusers has no model {entries['_class_name']!r}.")
    return ModelFactory(
        "diffusers",
        lambda: kind.from_config(dict(entries)),
        lambda: kind.from_pretrained(file.parent, local_files_only=True, use_safetensors=True),
    )


def _from_timm(file: Path, entries: Mapping[str, Any]) -> ModelFactory:
    timm = importlib.import_module("timm")
    given = {key: entries[key] for key in ("num_classes", "global_pool") if key in entries}

    def make() -> nn.Module:
        made: nn.Module = timm.create_model(entries["architecture"], **{**given, **(entries.get("model_args") or {})})
        return made

    def load() -> nn.Module:
        model = make()
        importlib.import_module("timm.models").load_checkpoint(model, str(file.with_name("model.safetensors")))
        return model

    return ModelFactory("timm", make, load)


#: Key that identifies a library's configuration -> name of the library, function that makes the factory.
_FACTORIES: Mapping[str, tuple[str, Callable[[Path, Mapping[str, Any]], ModelFactory]]] = {
    "model_type": ("transformers", _from_transformers),
    "_class_name": ("diffusers", _from_diffusers),
    "architecture": ("timm", _from_timm),
}
