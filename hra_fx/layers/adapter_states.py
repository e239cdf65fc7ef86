"""Load a state into the adapters of a layer: what does not fit is refused, and kept directions are taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hra_fx.compat import state_modules, tensor_versions
from hra_fx.errors import AdapterError
from hra_fx.functional import householder
from hra_fx.functional.chain import PAIRS, vectors_of
from hra_fx.functional.rotate import widest_dtype
from hra_fx.layers.sharding import full_tensor
from hra_fx.layers.target import KEPT, REFLECTION

#: A fused optimizer would take a saved state of vectors for one of pairs, because both have as many numbers.
_VECTORS = (
    "the state_dict has vectors, as written by PEFT, hra_fx 0.4 or with pairs=False, but the adapter trains pairs. The "
    "state of an optimizer that was saved with vectors does not fit pairs. Load the file of the adapter "
    "(hra_fx.load_adapter) and start a new optimizer, or train vectors: HRAConfig(..., pairs=False)."
)
#: The largest part of loaded vectors along directions that are kept, relative to their length.
_ROUNDING = 1e-3
#: Kept directions -> their version when they were checked. By identity, so copies are checked too.
_CHECKED: Any = WeakTensorKeyDictionary()


def check_states(model: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise an error if a state does not fit the adapters of a model, before anything is loaded."""
    for path, layer in state_modules(model, remove_duplicate=False):
        adapters: Any = layer._modules.get(REFLECTION)
        place = f"{prefix}{path}.{REFLECTION}." if path else f"{prefix}{REFLECTION}."
        for name in () if adapters is None else adapters.specs:
            if refused := why_refused(adapters, name, state_dict, place + name):
                raise AdapterError(f"{refused} Nothing was loaded.")


def why_refused(adapters: Any, name: str, state_dict: Mapping[str, Any], key: str) -> str | None:
    """Why the entries of an adapter in a state do not fit its `HouseholderAdapters`. `key` is that of the parameter."""
    spec, given, kept = adapters.specs[name], state_dict.get(key), state_dict.get(key + KEPT)
    if given is None:
        return None
    if name in adapters.scales:
        return f"{key}: adapter {name!r} has a scale. Call hra_fx.set_scale(model, {name!r}, 1) first."
    if spec.pairs and tuple(given.shape) == adapters.vectors_shape(spec.r):
        return f"{key}: {_VECTORS}"
    if kept is not None and tuple(kept.shape) != (shape := adapters.vectors_shape(kept.shape[-1])):
        return f"size mismatch for {key}{KEPT}: the model needs {shape}, but the state_dict has {tuple(kept.shape)}."
    try:
        if kept is not None:
            check_orthonormal({key: full_tensor(kept)})
        elif tuple(given.shape) == adapters.parameter_shape(name):  # those that ZeRO-3 has partitioned are empty here
            check_kept(adapters, name, vectors_of(adapters.form(name) & PAIRS, given))
    except AdapterError as error:
        return str(error)
    return None


def prepare_load(adapters: Any, name: str, state_dict: Mapping[str, Any], key: str) -> None:
    """Make room for the kept directions in a state."""
    if key not in state_dict or (kept := state_dict.get(key + KEPT)) is None:
        return
    adapters.shares.pop(name, None)
    own = adapters._buffers.get(name + KEPT)
    if own is None or own.shape != kept.shape:
        adapters.keep(name, kept.new_zeros(kept.shape, device=adapters[name].device))  # loading fills them


def check_orthonormal(directions: Mapping[str, Tensor]) -> None:
    """Raise an error if columns, by the name of their adapter, are neither orthonormal nor zero.

    They are checked again only after they were written, because the check waits for the device.
    """
    versions = dict(zip(directions, tensor_versions([*directions.values()]), strict=True))
    new = {name: one for name, one in directions.items() if _CHECKED.get(one) != versions[name] and not one.is_meta}
    if not new:
        return
    errors = {name: _error(one) for name, one in new.items()}
    device = next(iter(errors.values())).device
    if not bool(torch.stack([error.to(device) for error in errors.values()]).max() <= _ROUNDING):
        name = next(name for name, error in errors.items() if not bool(error <= _ROUNDING))
        raise AdapterError(
            f"{name}{KEPT}: its columns are not orthonormal, for example because states or buffers were averaged, so "
            "they protect nothing. Load a state that was saved as it is; or call hra_fx.unprotect(model), and "
            "hra_fx.protect after it."
        )
    for name, one in new.items():
        _CHECKED[one] = versions[name]


@torch.no_grad()
def _error(columns: Tensor) -> Tensor:
    wide = columns.to(widest_dtype(columns.device))
    with householder.without_autocast(wide):
        inner = wide.mT @ wide
        return (inner @ inner - inner).abs().max()


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
