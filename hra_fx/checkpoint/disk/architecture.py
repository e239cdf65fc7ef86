"""The folder of a base model, and the model that its `config.json` describes. Code in the folder is never run."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from hra_fx.errors import CheckpointError

#: A folder, or for adapters also a name on the Hub.
Source: TypeAlias = str | os.PathLike[str]
CONFIG = "config.json"
#: The file that describes a diffusers pipeline.
PIPELINE = "model_index.json"
EXPECTED = "Pass the folder of a transformers, diffusers or timm model."
#: What to do if the files do not contain enough information.
IN_MEMORY = "Load the model instead: hra_fx.load_adapter, then hra_fx.fold or hra_fx.save_as_lora."
#: Without this, transformers asks in the terminal whether to run code in the folder of a configuration.
_LOCAL_ONLY = {"local_files_only": True, "trust_remote_code": False}


def base_folder(base_dir: Source) -> Path:
    """The folder of a base model, without symbolic links."""
    base = Path(os.path.realpath(base_dir))
    if not base.is_dir():
        raise CheckpointError(
            f"{base_dir}: no such folder. Pass one with config.json and safetensors files, such as "
            "save_pretrained(folder) or `hf download NAME --local-dir FOLDER` writes."
        )
    return base


def _from_transformers(file: Path, entries: Mapping[str, Any], weights: bool) -> nn.Module:
    transformers = importlib.import_module("transformers")
    given = entries.get("architectures")
    names = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    cls: Any = next((found for name in names if (found := getattr(transformers, name, None))), None)
    # Use this file, which may be one of several in its folder.
    config = transformers.AutoConfig.from_pretrained(str(file), **_LOCAL_ONLY)
    config.name_or_path = str(file.parent)  # not the file: adapters name the folder of their base model
    made: nn.Module
    if weights:
        cls = cls or transformers.AutoModel
        with _without_progress_bar(transformers.utils.logging):
            made = cls.from_pretrained(file.parent, config=config, use_safetensors=True, **_LOCAL_ONLY)
    else:
        made = transformers.AutoModel.from_config(config) if cls is None else cls(config)
    return made


@contextmanager
def _without_progress_bar(settings: Any) -> Iterator[None]:
    """Context manager in which transformers shows no progress bar, whose settings are those of the process."""
    was_shown = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            settings.enable_progress_bar()


def _from_diffusers(file: Path, entries: Mapping[str, Any], weights: bool) -> nn.Module:
    cls: Any = getattr(importlib.import_module("diffusers"), str(entries["_class_name"]), None)
    if not hasattr(cls, "from_config"):
        raise CheckpointError(f"{file}: the installed diffusers has no model {entries['_class_name']!r}.")
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    made: nn.Module = cls.from_pretrained(file.parent, **options) if weights else cls.from_config(dict(entries))
    return made


def _from_timm(file: Path, entries: Mapping[str, Any], weights: bool) -> nn.Module:
    given = {key: entries[key] for key in ("num_classes", "global_pool") if key in entries}
    arguments = {**given, **(entries.get("model_args") or {})}
    made: nn.Module = importlib.import_module("timm").create_model(entries["architecture"], **arguments)
    if weights:
        importlib.import_module("timm.models").load_checkpoint(made, str(file.with_name("model.safetensors")))
    return made


#: Key that identifies a library's configuration -> name of the library, function that creates the model.
_LIBRARIES: Mapping[str, tuple[str, Callable[[Path, Mapping[str, Any], bool], nn.Module]]] = {
    "model_type": ("transformers", _from_transformers),
    "_class_name": ("diffusers", _from_diffusers),
    "architecture": ("timm", _from_timm),
}


def build_model(file: Path, entries: Mapping[str, Any], *, weights: bool = False) -> tuple[nn.Module, str]:
    """Build the model of a `config.json`, on the meta device unless with `weights`; and the name of its library."""
    key = next((key for key in _LIBRARIES if entries.get(key)), None)
    if key is None:
        raise CheckpointError(f"{file}: has none of the keys {', '.join(_LIBRARIES)}. {EXPECTED}")
    library, create = _LIBRARIES[key]
    if find_spec(library) is None:
        raise CheckpointError(f"{file}: {library} is not installed. Run: pip install {library}.")
    try:
        with torch.device("cpu" if weights else "meta"):
            return create(file, entries, weights), library
    except CheckpointError:
        raise
    # With an unusual configuration, the constructors of hundreds of models may raise any error.
    except Exception as error:
        what = f"{file.parent}: {library} cannot load" if weights else f"{file}: {library} cannot build"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(f"{what} the model ({reason}).") from error


class Architecture:
    """The model described by a folder's `config.json`, with `entries`; empty without a file."""

    def __init__(self, folder: Path) -> None:
        """Read the file, which must be a JSON object."""
        self.folder = folder
        self.entries: dict[str, Any] = {}
        if (file := folder / CONFIG).is_file():
            try:
                self.entries = json.loads(file.read_text(encoding="utf-8"))
                self.entries.keys()  # an AttributeError unless it is an object
            except (ValueError, AttributeError) as error:
                raise CheckpointError(f"{file}: must be a JSON object ({error}). Download it again.") from error

    @property
    def in_rows(self) -> bool:
        """Whether the library stores every weight as `(out, ...)`, as diffusers and timm do."""
        return not self.entries.get("model_type") and bool({"_class_name", "architecture"} & self.entries.keys())

    @property
    def model(self) -> nn.Module | None:
        """The transformers model on the meta device; `None` if transformers cannot build it."""
        return self._built if self.entries.get("model_type") else None

    @cached_property
    def _built(self) -> nn.Module | None:
        """The model, from any library."""
        try:
            return build_model(self.folder / CONFIG, self.entries)[0]
        except CheckpointError:
            return None

    def find(self, path: str) -> nn.Module | None:
        """The module with this path, possibly with the prefix added or removed; `None` if unknown."""
        found = self.place(path)
        return None if found is None else self._modules[found]

    def place(self, path: str) -> str | None:
        """The path in the model, possibly with the prefix added or removed; `None` if unknown."""
        return self.lookup(self._modules, path)

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return {} if self._built is None else dict(self._built.named_modules(remove_duplicate=False))

    def lookup(self, present: Collection[str], *names: str) -> str | None:
        """The first of several names that is present, directly or with the prefix added or removed."""
        if exact := next((name for name in names if name in present), None):
            return exact
        prefix = self.prefix
        spellings = (name.removeprefix(prefix) if name.startswith(prefix) else f"{prefix}{name}" for name in names)
        return next((name for name in spellings if name in present), None)

    @property
    def prefix(self) -> str:
        """The prefix that names have in a model with a head but not in a model without it, including the dot."""
        prefix = getattr(self.model, "base_model_prefix", "")
        return f"{prefix}." if prefix else ""
