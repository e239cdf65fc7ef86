"""Find weights that are stored as `(in, out)`, like those of transformers' `Conv1D` in GPT-2.

The shape is not enough for square weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.header import StoredTensor
from hra_fx.checkpoint.disk.naming import Names
from hra_fx.errors import CheckpointError
from hra_fx.layers.target import has_columns


class Columns:
    """Decides whether a layer's weight is `(in, out)`.

    Args:
        architecture: of the checkpoint.
        given: the user's list of such layers, ends of their paths; `None` to find out.
    """

    def __init__(self, architecture: Architecture, given: Collection[str] | None) -> None:
        """Store the arguments."""
        self._architecture = architecture
        self._given = None if given is None else frozenset(given)
        self._names: Names | None = None

    def of(self, path: str, weight: StoredTensor, d: int) -> bool:
        """Whether a layer's weight is `(in, out)`.

        Args:
            path: the layer.
            weight: its weight, `(out, ...)` or `(in, out)`.
            d: the length of its reflection vectors.

        Raises:
            CheckpointError: `d` does not fit, the layout is unknown, or the user contradicts `config.json`.
        """
        rows, width = weight.shape[0], math.prod(weight.shape[1:])
        known = self._known(path, weight) if len(weight.shape) == 2 else False
        if known is None and rows == width == d:
            raise CheckpointError(
                f"{weight.file}: {weight.name} is square, {tuple(weight.shape)}, and there is no config.json of a "
                "transformers, diffusers or timm model, so the layout is ambiguous: (out, in), or (in, out) as in "
                "GPT-2. Pass columns=[] (--rows) if every weight is (out, in), or columns=[names] (--columns NAME) to "
                "name layers that are (in, out)."
            )
        columns = rows == d != width if known is None else known
        inputs = rows if columns else width
        if inputs != d:
            raise CheckpointError(
                f"{weight.file}: {weight.name} of shape {weight.shape} has {inputs} inputs, but the adapter's vectors "
                f"of {path} have length {d}. Was the adapter trained on another base model?"
            )
        return columns

    def _known(self, path: str, weight: StoredTensor) -> bool | None:
        by_config = self._by_config(path)
        if self._given is None:
            return by_config
        said = any(path == name or path.endswith(f".{name}") for name in self._given)
        if by_config not in (None, said):
            kinds = ("(out, in)", "(in, out)")
            raise CheckpointError(
                f"{weight.file}: {weight.name} is {kinds[not said]} according to config.json, but {kinds[said]} "
                "according to columns (--columns, --rows). Omit columns, or correct config.json."
            )
        return said

    def _by_config(self, path: str) -> bool | None:
        """The layout according to `config.json`; `None` if unknown."""
        if self._architecture.in_rows:
            return False
        model = self._architecture.model
        if model is None:
            return None
        modules = dict(model.named_modules(remove_duplicate=False))
        self._names = self._names or Names("config.json", modules.keys(), lambda: self._architecture.prefix)
        found = self._names.find(path)
        return None if found is None else has_columns(modules[found])
