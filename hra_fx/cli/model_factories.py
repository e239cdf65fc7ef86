"""How each library makes a model of its `config.json`. Code that is not of an installed library is never run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from hra_fx.errors import CheckpointError

#: Without these, transformers asks on the terminal whether it may run what lies beside a configuration.
_ALONE = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Recipe:
    """How a model is made.

    Attributes:
        library: who makes it.
        make: without values.
        load: with those that lie beside its configuration.
    """

    library: str
    make: Callable[[], nn.Module]
    load: Callable[[], nn.Module]


def recipe_of(file: Path, entries: Mapping[str, Any]) -> Recipe:
    """The recipe for a configuration.

    Raises:
        CheckpointError: it does not say which model it is of, or the library is not installed.
    """
    for key, (library, recipe) in _RECIPES.items():
        if entries.get(key):
            if find_spec(library) is None:
                raise CheckpointError(f"{file}: is of {library}, which is not installed: pip install {library}.")
            return recipe(file, entries)
    raise CheckpointError(
        f"{file}: does not say which model it is of: none of {', '.join(_RECIPES)} is in it. Give the folder of a "
        "model of transformers, diffusers or timm."
    )


def _of_transformers(file: Path, entries: Mapping[str, Any]) -> Recipe:
    transformers = importlib.import_module("transformers")
    given = entries.get("architectures")
    names = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    kind: Any = next((found for name in names if (found := getattr(transformers, name, None))), None)

    def config() -> Any:
        # Of the very file, which may be one of several in its folder.
        return transformers.AutoConfig.from_pretrained(str(file), **_ALONE)

    def make() -> nn.Module:
        made: nn.Module = transformers.AutoModel.from_config(config()) if kind is None else kind(config())
        return made

    def load() -> nn.Module:
        transformers.utils.logging.disable_progress_bar()
        loaded: nn.Module = (kind or transformers.AutoModel).from_pretrained(
            file.parent, config=config(), use_safetensors=True, **_ALONE
        )
        return loaded

    return Recipe("transformers", make, load)


def _of_diffusers(file: Path, entries: Mapping[str, Any]) -> Recipe:
    kind: Any = getattr(importlib.import_module("diffusers"), str(entries["_class_name"]), None)
    if not hasattr(kind, "from_config"):
        raise CheckpointError(f"{file}: diffusers, as it is installed, has no model {entries['_class_name']!r}.")
    return Recipe(
        "diffusers",
        lambda: kind.from_config(dict(entries)),
        lambda: kind.from_pretrained(file.parent, local_files_only=True, use_safetensors=True),
    )


def _of_timm(file: Path, entries: Mapping[str, Any]) -> Recipe:
    timm = importlib.import_module("timm")
    given = {key: entries[key] for key in ("num_classes", "global_pool") if key in entries}

    def make() -> nn.Module:
        made: nn.Module = timm.create_model(entries["architecture"], **{**given, **(entries.get("model_args") or {})})
        return made

    def load() -> nn.Module:
        model = make()
        importlib.import_module("timm.models").load_checkpoint(model, str(file.with_name("model.safetensors")))
        return model

    return Recipe("timm", make, load)


#: The entry that tells a library's configuration -> its name, and how it is read.
_RECIPES: Mapping[str, tuple[str, Callable[[Path, Mapping[str, Any]], Recipe]]] = {
    "model_type": ("transformers", _of_transformers),
    "_class_name": ("diffusers", _of_diffusers),
    "architecture": ("timm", _of_timm),
}
