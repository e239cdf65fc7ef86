"""Load a state into the adapters of a layer: one of PEFT or of 0.4, which has vectors, or one with kept directions."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.functional.pairs import to_pairs
from hra_fx.layers.containers import KEPT
from hra_fx.layers.sharding import full_tensor

#: The largest part of loaded vectors along directions that are kept, relative to their length.
_ROUNDING = 1e-3


def prepare_load(adapters: Any, name: str, state_dict: dict[str, Any], key: str, errors: list[str]) -> None:
    """Convert the entries of an adapter in a state to those of its `HouseholderAdapters`. `key` is of the parameter."""
    spec, given, kept = adapters.specs[name], state_dict.get(key), state_dict.get(key + KEPT)
    if given is None:
        return
    if spec.pairs and tuple(given.shape) == adapters.vectors_shape(spec.r):
        # The same text for all layers, so that Python shows it once.
        text = (
            "the state_dict has vectors, as written by PEFT or hra_fx 0.4. They are converted to the pairs that the "
            "adapters train. The state of an optimizer that was saved with them does not fit, unless it is one of "
            "train_pairs in 0.4. HRAConfig(..., pairs=False) continues to train vectors."
        )
        warnings.warn(text, HRAWarning, stacklevel=2)
        state_dict[key] = given = to_pairs(given)
    if kept is not None:
        adapters.shares.pop(name, None)
        held = adapters.kept(name)
        if held is None or held.shape != kept.shape:
            # Zeros of the shape that is possible: loading fills them, or reports another shape.
            shape = adapters.vectors_shape(kept.shape[-1])
            adapters.keep(name, kept.new_zeros(shape, device=adapters[name].device))
    elif tuple(given.shape) == adapters.parameter_shape(name):
        try:
            check_kept(adapters, name, adapters.part(name, given)._replace(kept=None).vectors())
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
