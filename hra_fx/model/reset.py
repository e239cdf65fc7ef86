"""Replace the values of an adapter in place, because an optimizer may use them; `reset_adapters` initializes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hra_fx.errors import AdapterError
from hra_fx.functional import householder
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.adapter_states import check_kept
from hra_fx.layers.sharding import device_of_values, distribute_like, on_first_rank
from hra_fx.layers.trained_copies import all_copies, copies_of
from hra_fx.model.state import AdapterState, adapted_layers, check_unmerged, collect_parts, names_in, root_of
from hra_fx.model.trainable import differ_by_place, set_requires_grad
from hra_fx.model.whole import check_whole


def reset_adapters(model: nn.Module, adapter_names: str | Iterable[str] | None = None) -> None:
    """Initialize the vectors of adapters again as configured.

    `transform` of a model on the meta device creates vectors without data. Call this function when the model has its
    weights (after `to_empty` and `load_state_dict`, or `load_state_dict(assign=True)`). With the same seed, the vectors
    of `target_modules` equal those of `transform` and `add_adapter` on a model with weights.

    With `fully_shard`, call this in every process after `to_empty`. Each one gets its shard of the vectors that the
    first process draws.

    Args:
        model: a transformed model.
        adapter_names: the adapters; `None` for all, in the order in which they were added.

    Raises:
        AdapterError: the model has no such adapter; adapters are merged, have a scale other than 1 or trained copies
            (`modules_to_save`, `bias`); or a layer is on the meta device. The model is unchanged.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(6, 4))
        >>> model = transform(model, HRAConfig(r=2, target_modules=["0"])).to_empty(device="cpu")
        >>> missing = model.load_state_dict(nn.Sequential(nn.Linear(6, 4)).state_dict(), strict=False)
        >>> reset_adapters(model)
        >>> tuple(model[0].hra_u["default"].shape), bool(model[0].hra_u["default"].isfinite().all())
        ((6, 1, 2), True)
    """
    root, state = root_of(model)
    names = names_in(state, state.configs if adapter_names is None else adapter_names)
    check_whole(root, "reset its adapters")
    for name in names:
        check_replaceable(root, state, name)
        if copies_of(root, name):
            raise AdapterError(
                f"adapter {name!r} has trained copies (modules_to_save or bias), which start from the base model's "
                "weights. Load these before hra_fx.transform, or call hra_fx.load_adapter."
            )
        for path, layer in layers_of(root, name).items():
            if layer.hra_u.device_of(layer).type == "meta":
                raise AdapterError(
                    f"{path}: its weight is on the meta device. Call model.to_empty(device=...) or "
                    "model.load_state_dict(..., assign=True) first."
                )
    with torch.inference_mode(False):
        for name in names:
            vectors = {path: _start(layer, name) for path, layer in layers_of(root, name).items()}
            replace_values(root, name, vectors, {})


def _start(layer: AdaptedLayer, name: str) -> Tensor:
    """Draw the vectors of a layer as `transform` does."""
    spec, dtype = layer.hra_u.specs[name], householder.working_dtype(layer.hra_u[name].dtype)
    return on_first_rank([layer.hra_u[name]], lambda: layer.hra_u.initial(spec, dtype))


def check_replaceable(root: nn.Module, state: AdapterState, name: str) -> None:
    """Check that the values of an adapter can be replaced."""
    check_unmerged(state)
    if any(name in layer.hra_u.scales for layer in layers_of(root, name).values()):
        raise AdapterError(f"adapter {name!r} must have scale 1. Call hra_fx.set_scale(model, {name!r}, 1) first.")


def layers_of(root: nn.Module, name: str) -> dict[str, AdaptedLayer]:
    """Path -> layer with this adapter."""
    return {path: layer for path, layer in adapted_layers(root).items() if name in layer.hra_u.specs}


def replace_adapter(
    root: nn.Module,
    name: str,
    apply_GS: bool,
    vectors: Mapping[str, Tensor],
    copies: Mapping[tuple[str, str], Tensor],
    *,
    is_trainable: bool,
) -> None:
    """Copy the vectors and copies of a file into an adapter, if they fit it, and train them or not."""
    state = root_of(root)[1]
    check_replaceable(root, state, name)
    layers, held = layers_of(root, name), copies_of(root, name)
    shapes = {path: layer.hra_u.vectors_shape(layer.hra_u.specs[name].r) for path, layer in layers.items()}
    differs = any(layer.hra_u.specs[name].apply_GS is not apply_GS for layer in layers.values())
    differs = differs or shapes != {path: tuple(one.shape) for path, one in vectors.items()}
    if differs or held.keys() != copies.keys() or differ_by_place(held, copies):
        raise AdapterError(
            f"adapter {name!r} exists in the model, but with other layers, r, apply_GS, bias, modules_to_save "
            "or tied weights than in the file. Delete it first (hra_fx.delete_adapter), or load under another "
            "adapter_name."
        )
    for path, layer in layers.items():
        check_kept(layer.hra_u, name, vectors[path])
    replace_values(root, name, vectors, copies)
    state.configs[name].inference_mode = not is_trainable
    set_requires_grad(collect_parts(root), {name: is_trainable and name in state.active})


def replace_values(
    root: nn.Module, name: str, vectors: Mapping[str, Tensor], copies: Mapping[tuple[str, str], Tensor]
) -> None:
    """Replace the values of an adapter in place: the vectors `U: (d, r)` of layers, by path, and its trained copies.

    Every process that has shards must call this. Tensors on the meta device are replaced by new tensors on the device
    of the base weight, or the CPU.
    """
    layers, owners = layers_of(root, name), all_copies(root)
    made: dict[Tensor, Tensor] = {}  # a copy that two modules share stays one tensor
    with torch.no_grad():
        for path, layer in layers.items():
            layer.hra_u.replace(name, vectors[path], device_of_values(layer.hra_u.device_of(layer)))
        for (path, entry), value in copies.items():
            owner, held = owners[path]
            own = held.get(owner, name, entry)
            if own.is_meta:
                new = value.detach().to(own.dtype, copy=True)
                is_parameter = isinstance(own, nn.Parameter)
                made.setdefault(own, nn.Parameter(new, own.requires_grad) if is_parameter else new)
                held.set(owner, name, entry, made[own])
            else:
                own.copy_(distribute_like(value, own))
