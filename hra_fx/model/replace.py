"""Replace the values of an adapter's vectors and trained copies in place, because an optimizer may use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from hra_fx.errors import AdapterError
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.adapter_names import ANCHOR
from hra_fx.layers.sharding import device_of_values, distribute_like, is_dtensor, local_tensor, reshard
from hra_fx.layers.trained_copies import BASE, Copies, all_copies
from hra_fx.model.state import AdapterState, adapted_layers


def check_replaceable(root: nn.Module, state: AdapterState, name: str) -> None:
    """Check that the values of an adapter can be replaced."""
    if name in state.merged:
        raise AdapterError(f"adapter {name!r} is merged into the weights. Call unmerge_adapter first.")
    layers = layers_of(root, name)
    if any(name in layer.hra_u.scales for layer in layers.values()):
        raise AdapterError(f"adapter {name!r} must have scale 1. Call hra_fx.set_scale(model, {name!r}, 1) first.")
    for path, layer in layers.items():
        if is_dtensor(layer.hra_u[name]) and layer.hra_u[name].is_meta:
            raise AdapterError(
                f"{path}: its vectors are sharded and on the meta device. Call model.to_empty(device=...) first, to "
                "create the shards of this process."
            )


def layers_of(root: nn.Module, name: str) -> dict[str, AdaptedLayer]:
    """Path -> layer with this adapter, in the order in which `transform` initializes them: 3-D parameters are last."""
    layers = {path: layer for path, layer in adapted_layers(root).items() if name in layer.hra_u.specs}
    return dict(sorted(layers.items(), key=lambda item: item[1].hra_u.kind == "experts"))


def replace_values(
    root: nn.Module,
    name: str,
    vectors: Callable[[str, AdaptedLayer], tuple[Tensor, Tensor | None]],
    copies: Mapping[tuple[str, str], Tensor],
    device: torch.device | str | None = None,
) -> None:
    """Replace the values of an adapter in place. Tensors on the meta device are replaced by new tensors.

    `vectors` returns `U: (d, r)` and the anchor of a layer, and is called in the order of `layers_of`. `copies` is
    (path of a module, name of its tensor) -> value of a trained copy. Every process that has shards must call this.
    Without `device`, tensors on the meta device get the device of the base weight, or the CPU.
    """
    reshard(root.modules())
    owners = all_copies(root)
    made: dict[int, Tensor] = {}  # a copy that two modules share stays one tensor
    with torch.no_grad(), ExitStack() as undo:
        for owner, held in owners.values():
            _fill_base(owner, held)
        for path, layer in layers_of(root, name).items():
            adapters, own = layer.hra_u, layer.hra_u[name]
            if (anchor := adapters.anchor(name)) is not None:
                undo.callback(adapters.register_buffer, name + ANCHOR, anchor)
            if own.is_meta:
                undo.callback(adapters.__setitem__, name, own)
            else:
                undo.callback(own.copy_, own.clone())
            adapters.replace(
                name, *vectors(path, layer), torch.device(device or device_of_values(adapters.device_of(layer)))
            )
        for (path, entry), value in copies.items():
            owner, held = owners[path]
            own = held.get(owner, name, entry)
            if own.is_meta:
                undo.callback(held.set, owner, name, entry, own)
                made.setdefault(id(own), _like(own, value, device))
                held.set(owner, name, entry, made[id(own)])
            else:
                undo.callback(own.copy_, own.clone())
                own.copy_(distribute_like(value, own))
        undo.pop_all()


def _fill_base(owner: nn.Module, copies: Copies) -> None:
    """Fill the base model's tensors that are NaN after `to_empty`, if a trained copy is in use instead of them.

    torch's `set_model_state_dict` fills tensors by name, and a copy in use has the name of the base model's tensor. So
    the copy has the values of the base model.
    """
    pairs = [(copies.get(owner, BASE, entry), copies.get(owner, of, entry)) for entry, of in copies.in_place.items()]
    floating = [base for base, _ in pairs if base.is_floating_point() and not base.is_meta]
    empty = {id(base) for base in floating if local_tensor(base).numel() and bool(local_tensor(base).isnan().all())}
    for base, present in pairs:
        # Integers cannot be NaN: they are filled together with the other tensors.
        if id(base) in empty or (empty and not base.is_floating_point() and not base.is_meta):
            base.copy_(present)


def _like(own: Tensor, value: Tensor, device: torch.device | str | None) -> Tensor:
    """Create a tensor with this value, to replace a tensor without data."""
    new = value.detach().to(device or value.device, own.dtype, copy=True)
    return nn.Parameter(new, own.requires_grad) if isinstance(own, nn.Parameter) else new
