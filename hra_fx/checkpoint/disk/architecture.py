"""What `config.json` says about a checkpoint.

Importing a model's code takes seconds, longer than a fold. So a model is built only for layers whose weight may be
transposed or tied, or whose name is not in the file. In most cases the text of the model's code shows that its weights
are not transposed, and that nothing in numbered blocks is tied.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from hra_fx.checkpoint.disk.libraries import build_empty
from hra_fx.checkpoint.disk.naming import Names
from hra_fx.errors import CheckpointError

CONFIG = "config.json"
_CONV1D = re.compile(r"\bConv1D\b")
#: The tied weights of a class: None, or pairs of names; `_PLAIN` matches names without numbers.
_TIES = re.compile(r"\b_tied_weights_keys\b(?: = (?P<none>None)\b| = \{(?P<pairs>[^}]*)\})?")
_PLAIN = re.compile(r"""(["'])(?:[A-Za-z_]\w*\.)+(?:weight|bias)\1""")


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

    @cached_property
    def in_rows(self) -> bool | None:
        """Whether every weight is `(out, ...)`; `None` if unknown without building the model."""
        if not self.entries:
            return None
        if not self._sources:
            # diffusers and timm have no other layout.
            return True if {"_class_name", "architecture"} & self.entries.keys() else None
        return True if all(self._sources) and not any(_CONV1D.search(text) for text in self._sources) else None

    @cached_property
    def ties_in_blocks(self) -> bool:
        """Whether transformers may tie tensors in numbered blocks, like the heads of Deformable DETR's decoder."""
        return not all(text and all(map(_in_no_block, _TIES.finditer(text))) for text in self._sources)

    @cached_property
    def _sources(self) -> list[str]:
        """Source code of each model type in the file; empty if not found."""
        kinds = _values(self.entries, "model_type")
        return [_source(kind) for kind in {kind if isinstance(kind, str) else "" for kind in kinds}]

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

    def may_read_weight(self, names: Iterable[str]) -> bool:
        """Whether the text of the code of transformers reads the weight of a layer with one of these names."""
        layers = "|".join(map(re.escape, names))
        return any(re.search(rf"\bself\.(\w+\.)*({layers})\.(in_proj_)?weight\b", text) for text in self._sources)

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


def _in_no_block(ties: re.Match[str]) -> bool:
    """Whether a class certainly ties nothing in numbered blocks; patterns and computed names are not certain."""
    if ties["none"]:
        return True
    return ties["pairs"] is not None and not re.sub(r"#.*|[\s:,]", "", _PLAIN.sub("", ties["pairs"]))


def _source(model_type: str) -> str:
    """Source code of transformers for a model type; empty if not found."""
    found = importlib.util.find_spec("transformers")
    if found is None or not found.submodule_search_locations or not model_type:
        return ""
    folder = Path(found.submodule_search_locations[0], "models", model_type.replace("-", "_"))
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("modeling_*.py"))]
    return "\n".join(texts)
