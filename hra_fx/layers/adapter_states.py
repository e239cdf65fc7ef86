"""Load a state into the adapters of a layer: what does not fit is refused, and kept directions are taken over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hra_fx.errors import AdapterError
from hra_fx.functional.chain import PAIRS, vectors_of
from hra_fx.layers.sharding import full_tensor
from hra_fx.layers.target import KEPT

#: A fused optimizer would take a saved state of vectors for one of pairs, because both have as many numbers.
_VECTORS = (
    "the state_dict has vectors, as written by PEFT, hra_fx 0.4 or with pairs=False, but the adapter trains pairs. The "
    "state of an optimizer that was saved with vectors does not fit pairs. Load the file of the adapter "
    "(hra_fx.load_adapter) and start a new optimizer, or train vectors: HRAConfig(..., pairs=False)."
)
#: The largest part of loaded vectors along directions that are kept, relative to their length.
_ROUNDING = 1e-3


def prepare_load(adapters: Any, name: str, state_dict: dict[str, Any], key: str, errors: list[str]) -> None:
    """Check the entries of an adapter in a state, for its `HouseholderAdapters`. `key` is that of the parameter."""
    spec, given, kept = adapters.specs[name], state_dict.get(key), state_dict.get(key + KEPT)
    if given is None:
        return
    if name in adapters.scales:
        errors.append(f"{key}: adapter {name!r} has a scale. Call hra_fx.set_scale(model, {name!r}, 1) first.")
    elif spec.pairs and tuple(given.shape) == adapters.vectors_shape(spec.r):  # torch reports each layer too
        if not any(error.endswith(_VECTORS) for error in errors):
            errors.append(f"{key}: {_VECTORS}")
    elif kept is not None:
        adapters.shares.pop(name, None)
        inner = full_tensor(kept).mT @ full_tensor(kept)
        if not kept.is_meta and not torch.allclose(inner @ inner, inner, atol=_ROUNDING):
            errors.append(f"{key}{KEPT}: its columns are not orthonormal, for example because states were averaged.")
        held = adapters.kept(name)
        if held is None or held.shape != kept.shape:
            # Zeros of the shape that is possible: loading fills them, or reports another shape.
            shape = adapters.vectors_shape(kept.shape[-1])
            adapters.keep(name, kept.new_zeros(shape, device=adapters[name].device))
    elif tuple(given.shape) == adapters.parameter_shape(name):  # those that ZeRO-3 has partitioned are empty here
        try:
            check_kept(adapters, name, vectors_of(adapters.form(name) & PAIRS, given))
        except AdapterError as error:
            errors.append(str(error))


def check_kept(adapters: Any, name: str, vectors: Tensor) -> None:
    """Raise an error if new vectors `(d, r)` of an adapter are not orthogonal to the directions that it keeps."""
    kept = adapters.kept(name)
    if kept is None or kept.is_meta or vectors.is_meta:
        return
    wide = full_tensor(vectors.detach()).to(kept.device, kept.dtype)
    if (kept.mT @ wide).norm() > _ROUNDING * wide.norm():
        raise AdapterError(
            f"{adapters.layer_path}: the adapter {name!r} keeps directions (hra_fx.protect), but the vectors to load "
            f"change them: they were trained with other directions or none, or saved without {name + KEPT}. Call "
            "hra_fx.unprotect(model) before you load them, and hra_fx.protect after it."
        )
