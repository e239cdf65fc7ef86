"""What `config.json` says about a checkpoint, and the model that it describes, built without weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from hra_fx.checkpoint.disk.libraries import build_empty
from hra_fx.checkpoint.disk.naming import Names
from hra_fx.errors import CheckpointError

CONFIG = "config.json"


class Architecture:
    """The model described by a folder's `config.json`.

    Attributes:
        folder: the folder.
        entries: entries of the file; empty if there is none.
    """

    def __init__(self, folder: Path) -> None:
        """Read the file.

        Raises:
            CheckpointError: the file is not a JSON object.
        """
        self.folder = folder
        self.entries: dict[str, Any] = {}
        if (file := folder / CONFIG).is_file():
            try:
                self.entries = json.loads(file.read_text(encoding="utf-8"))
                self.entries.keys()
            except (ValueError, AttributeError, RecursionError) as error:
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
        """The model of any library."""
        return build_empty(self.folder / CONFIG, self.entries)

    def find(self, path: str) -> nn.Module | None:
        """The module of a path, also with the prefix added or removed; `None` if unknown."""
        found = self.place(path)
        return None if found is None else self._modules[found]

    def place(self, path: str) -> str | None:
        """The path in the model, with the prefix added or removed; `None` if unknown."""
        return self._names.find(path)

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return {} if self._built is None else dict(self._built.named_modules(remove_duplicate=False))

    @cached_property
    def _names(self) -> Names:
        return Names(CONFIG, self._modules.keys(), lambda: self.prefix)

    @property
    def prefix(self) -> str:
        """The prefix that names have in a model with a head, and do not have without it; with its dot."""
        prefix = getattr(self.model, "base_model_prefix", "")
        return f"{prefix}." if prefix else ""

    @property
    def says_tied(self) -> bool:
        """Whether the file says that embeddings are tied."""
        return any(flag is True for flag in _values(self.entries, "tie_word_embeddings"))


def _values(entries: object, key: str) -> Iterator[Any]:
    """All values of a key, at any depth."""
    if isinstance(entries, dict):
        if key in entries and entries[key] not in (None, ""):
            yield entries[key]
        for inner in entries.values():
            yield from _values(inner, key)
