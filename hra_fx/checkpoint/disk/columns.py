"""Find weights that are stored as `(in, out)`, like those of transformers' `Conv1D` in GPT-2.

The shape is not enough for square weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.requests import LayerChain
from hra_fx.checkpoint.disk.stored import StoredTensor
from hra_fx.errors import CheckpointError
from hra_fx.layers.experts_weight import parameter_of
from hra_fx.layers.target import has_columns


def in_columns(
    chain: LayerChain, weight: StoredTensor, architecture: Architecture, given: Collection[str] | None
) -> bool:
    """Whether a layer's weight is `(in, out)`.

    Args:
        chain: what an adapter does to it.
        weight: the weight, `(out, ...)` or `(in, out)`; of all experts, with them in front.
        architecture: of the checkpoint.
        given: the user's list of such layers, ends of their paths; `None` to find out.

    Raises:
        CheckpointError: the length of the vectors does not fit, the layout is unknown, or the user contradicts
            `config.json`.
    """
    d = chain.vectors.shape[-2]
    rows, *others = weight.shape[chain.vectors.dim() - 2 :]
    width = math.prod(others)
    known = _known(chain, weight, architecture, given) if len(others) == 1 else False
    if known is None and rows == width == d:
        raise CheckpointError(
            f"{weight.file}: {weight.name} is square, {tuple(weight.shape)}, and the folder has no config.json of a "
            "transformers, diffusers or timm model, so the layout is ambiguous: (out, in), or (in, out) as in "
            "GPT-2. Pass columns=[] (--rows) if every weight is (out, in), or columns=[names] (--columns NAME) to "
            "name layers that are (in, out)."
        )
    columns = rows == d != width if known is None else known
    inputs = rows if columns else width
    if inputs != d:
        raise CheckpointError(
            f"{weight.file}: {weight.name} of shape {weight.shape} has {inputs} inputs, but the adapter's vectors "
            f"of {chain.path} have length {d}. Was the adapter trained on another base model?"
        )
    return columns


def _known(
    chain: LayerChain, weight: StoredTensor, architecture: Architecture, given: Collection[str] | None
) -> bool | None:
    """The layout according to `config.json` or the user; `None` if unknown."""
    path, by_config = chain.path, chain.columns
    if chain.vectors.dim() == 3 or by_config is not None:
        path = parameter_of(path)
    else:
        layer = None if architecture.in_rows else architecture.find(path)
        by_config = False if architecture.in_rows else None if layer is None else has_columns(layer)
    if given is None:
        return by_config
    said = any(path == name or path.endswith(f".{name}") for name in given)
    if by_config not in (None, said):
        kinds = ("(out, in)", "(in, out)")
        raise CheckpointError(
            f"{weight.file}: {weight.name} is {kinds[not said]} according to config.json, but {kinds[said]} "
            "according to columns (--columns, --rows). Omit columns, or correct config.json."
        )
    return said
