"""`merge_adapter` and `unmerge_adapter`: fold adapters into the weights temporarily, and restore the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from hra_fx.errors import AdapterError, FoldError, HRAWarning
from hra_fx.layers.accelerate_hooks import offloading_hook
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.sharding import distribute_like, reshard
from hra_fx.layers.target import weight_place
from hra_fx.model.inject import all_or_nothing, complete
from hra_fx.model.rotate import check_floating, check_layer, check_no_ties, check_whole, folded_weight
from hra_fx.model.state import AdapterState, adapted_layers, collect_parts, names_in, root_of
from hra_fx.model.trainable import check_copies, sync_layers


def merge_adapter(model: nn.Module, adapter_names: str | Iterable[str] | None = None) -> None:
    """Fold adapters into the weights temporarily, `W <- W Q`, so that a forward is as fast as the base model's.

    Every merged layer keeps a copy of its base weight in the buffer `hra_u.unmerged`, so that `unmerge_adapter`
    restores it bit for bit in every dtype. While adapters are merged, the adapted weights take twice their memory, and
    the `state_dict` contains both. A merged `state_dict` can only be loaded into a model with merged adapters. To fold
    permanently, without copies, call `fold`.

    Args:
        model: a transformed model.
        adapter_names: the active adapters to merge, which must be the first ones in the product; `None` for all. An
            adapter that is not active becomes active, before the other adapters.

    Raises:
        AdapterError: the model has no such adapter, no adapter is active, other adapters are already merged, or an
            adapter that is not merged comes earlier in the product.
        FoldError: a weight cannot be rotated (see `fold`), for example a quantized one. After any error the model is
            unchanged.

    Warns:
        HRAWarning: the adapters are already merged.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> before = model[0].weight.clone()
        >>> merge_adapter(model)
        >>> unmerge_adapter(model)
        >>> bool((model[0].weight == before).all())
        True
    """
    root, state = root_of(model)
    wanted = state.active if adapter_names is None else names_in(state, adapter_names)
    if state.merged and set(state.merged) >= set(wanted):
        text = f"adapters {list(state.merged)} are already merged; merge_adapter does nothing."
        warnings.warn(text, HRAWarning, stacklevel=2)
        return
    if state.merged:
        raise AdapterError(f"adapters {list(state.merged)} are already merged. Call unmerge_adapter first.")
    merge(root, state, resolve_merge_order(state, adapter_names))


def unmerge_adapter(model: nn.Module) -> None:
    """Restore the weights from before `merge_adapter`, bit for bit. The forward then computes the adapters again.

    Raises:
        AdapterError: the model has no adapters.

    Warns:
        HRAWarning: no adapter is merged.
    """
    root, state = root_of(model)
    if not state.merged:
        warnings.warn("no adapter is merged; unmerge_adapter does nothing.", HRAWarning, stacklevel=2)
        return
    reshard(model.modules())

    def restore() -> None:
        for layer in adapted_layers(root).values():
            _restore(layer)
        state.merged = ()
        sync_layers(collect_parts(root), state)

    complete(restore)


def merge(root: nn.Module, state: AdapterState, names: tuple[str, ...]) -> None:
    """Merge adapters in the resolved order. Every layer is checked before the first weight is written."""
    layers = adapted_layers(root)
    check_copies(root, collect_parts(root), dict.fromkeys((*names, *state.active)))
    for path, layer in layers.items():
        if offloading_hook(weight_place(layer)[0]) is not None:
            raise FoldError(
                f"{path}: accelerate offloads its weight, but merging keeps a copy of each weight in memory. Adapters "
                "also work without being merged; hra_fx.fold writes the folded weights without copies."
            )
    check_whole(root)
    check_no_ties(root, layers)
    check_floating(layers, names, " Adapters also work without being merged.")
    present = {path: [name for name in names if name in layer.hra_u] for path, layer in layers.items()}
    for path, here in present.items():
        if here:
            check_layer(path, layers[path], here)
    with all_or_nothing() as undo, torch.no_grad():
        for layer, here in ((layers[path], here) for path, here in present.items() if here):
            weight = folded_weight(layer, here).weight
            layer.hra_u.unmerged = layer.hra_base.detach().clone()
            undo.callback(_restore, layer)
            layer.hra_base.copy_(weight)
        others = tuple(name for name in state.active if name not in names)
        undo.callback(setattr, state, "active", state.active)
        state.active, state.merged = names + others, names
        sync_layers(collect_parts(root), state)


def resolve_merge_order(state: AdapterState, adapter_names: str | Iterable[str] | None) -> tuple[str, ...]:
    """The adapters to fold into the weights, in the order of the product; `None` means all active ones."""
    if state.disabled:
        raise AdapterError(
            "adapters are disabled. Leave the disable_adapters block, or call set_adapter or enable_adapter_layers()."
        )
    names = state.active if adapter_names is None else names_in(state, adapter_names)
    if not names:
        raise AdapterError("no adapter is active. Name one, or call hra_fx.set_adapter first.")
    inside = tuple(name for name in state.active if name in names)
    if inside != state.active[: len(inside)] or inside != tuple(name for name in names if name in inside):
        raise AdapterError(
            f"adapters {list(names)} cannot be folded first: the model computes W Q in the order {list(state.active)}."
            " Fold the first ones of that order, or set another order with hra_fx.set_adapter."
        )
    return names


@torch.no_grad()
def _restore(layer: AdaptedLayer) -> None:
    if layer.hra_u.unmerged is not None:
        layer.hra_base.copy_(distribute_like(layer.hra_u.unmerged, layer.hra_base))
        layer.hra_u.unmerged = None
