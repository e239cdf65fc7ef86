"""Which weights are stored as `(in, out)`: those of transformers' `Conv1D`, that GPT-2 has.

The shape tells only where it is not square.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.header import Stored
from hra_fx.checkpoint.disk.naming import Names
from hra_fx.errors import CheckpointError
from hra_fx.layers.target import has_columns


class Columns:
    """Tells of a layer whether its weight is `(in, out)`.

    Args:
        architecture: of the checkpoint.
        given: what the user says of it: names of such layers, the last parts of their paths; `None` to find out.
    """

    def __init__(self, architecture: Architecture, given: Collection[str] | None) -> None:
        """Nothing is found out yet."""
        self._architecture = architecture
        self._given = None if given is None else frozenset(given)
        self._names: Names | None = None

    def of(self, path: str, weight: Stored, d: int) -> bool:
        """Whether the weight of a layer is `(in, out)`.

        Args:
            path: the layer.
            weight: its weight, `(out, ...)` or `(in, out)`.
            d: the length of its reflection vectors.

        Raises:
            CheckpointError: `d` does not fit, nothing tells, or the user says otherwise than `config.json`.
        """
        rows, width = weight.shape[0], math.prod(weight.shape[1:])
        known = self._known(path, weight) if len(weight.shape) == 2 else False
        if known is None and rows == width == d:
            raise CheckpointError(
                f"{weight.file}: {weight.name} is square, {tuple(weight.shape)}, and config.json does not tell of a "
                "model of transformers, diffusers or timm, so that it may be (out, in) or, as in GPT-2, (in, out). "
                "Give columns=[] if every weight is (out, in), or columns=[names of layers that are not]."
            )
        columns = rows == d != width if known is None else known
        due = rows if columns else width
        if due != d:
            raise CheckpointError(
                f"{weight.file}: {weight.name} has shape {weight.shape}, a layer of {due} inputs, and the adapter's "
                f"vectors of {path} have length {d}. Was the adapter trained on another base model?"
            )
        return columns

    def _known(self, path: str, weight: Stored) -> bool | None:
        told = self._told(path)
        if self._given is None:
            return told
        said = any(path == name or path.endswith(f".{name}") for name in self._given)
        if told not in (None, said):
            kinds = ("(out, in)", "(in, out)")
            raise CheckpointError(
                f"{weight.file}: {weight.name} is given as stored {kinds[said]}, and config.json is of a model that "
                f"stores it {kinds[not said]}. Leave columns out, or correct config.json."
            )
        return said

    def _told(self, path: str) -> bool | None:
        """What `config.json` tells, if it does."""
        if self._architecture.in_rows:
            return False
        model = self._architecture.model
        if model is None:
            return None
        modules = dict(model.named_modules(remove_duplicate=False))
        self._names = self._names or Names("config.json", modules.keys(), lambda: self._architecture.prefix)
        found = self._names.find(path)
        return None if found is None else has_columns(modules[found])
