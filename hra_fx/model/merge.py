"""`merge_adapter` and `unmerge_adapter`: the active adapters inside the weights for a while, and out again exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.layers.sharding import laid_out_as, reshard
from hra_fx.model.activate import check_copies, refresh
from hra_fx.model.defer_interrupt import uninterrupted
from hra_fx.model.rotate import check_floating, check_weights, rotated
from hra_fx.model.state import Record, inventory, names_in, root_of, sites_of


def merge_adapter(model: nn.Module, adapter_names: str | Iterable[str] | None = None) -> None:
    """Put adapters into the weights, `W <- W Q`, and keep them: a forward then costs what the base model's costs.

    The weights that were there are kept (`hra_u.unmerged`), so that `unmerge_adapter` restores them bit for bit in
    every dtype. All new weights are computed, and found finite, before the first is written.

    Args:
        model: a transformed model.
        adapter_names: which of the active adapters, the first ones in their order; `None` for all of them. An adapter
            that is not active becomes active, before the others.

    Raises:
        AdapterError: there is no such adapter, none to merge, others are merged already, or adapters before it in the
            product would stay behind.
        FoldError: a weight that cannot be rotated (see `fold`), as a quantised one. After any error the model is as it
            was.

    Warns:
        HRAWarning: these are merged already.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> before = model[0].weight.clone()
        >>> merge_adapter(model)
        >>> unmerge_adapter(model)
        >>> bool((model[0].weight == before).all())
        True
    """
    root, record = root_of(model)
    wanted = record.active if adapter_names is None else names_in(record, adapter_names)
    if record.merged and set(record.merged) >= set(wanted):
        warnings.warn(f"adapters {list(record.merged)} are merged already; nothing is done.", HRAWarning, stacklevel=2)
        return
    if record.merged:
        raise AdapterError(f"adapters {list(record.merged)} are merged already. Call unmerge_adapter first.")
    names = first_of(record, adapter_names)
    _merge(root, record, names)


def unmerge_adapter(model: nn.Module) -> None:
    """Take merged adapters out of the weights, which are then what they were, bit for bit.

    Raises:
        AdapterError: the model has no reflections.

    Warns:
        HRAWarning: nothing is merged.
    """
    root, record = root_of(model)
    if not record.merged:
        warnings.warn("unmerge_adapter: nothing is merged; nothing is done.", HRAWarning, stacklevel=2)
        return
    reshard(model)
    with torch.no_grad(), uninterrupted():
        for layer in sites_of(root).values():
            if layer.hra_u.unmerged is not None:
                layer.hra_base.copy_(laid_out_as(layer.hra_u.unmerged, layer.hra_base))
                layer.hra_u.unmerged = None
        record.merged = ()
        refresh(inventory(root), record)


@contextmanager
def merged_again(root: nn.Module, record: Record) -> Iterator[None]:
    """Unmerged inside the block, merged as before after it, unless other adapters were set inside."""
    names, active = record.merged, record.active
    if names:
        unmerge_adapter(root)
    try:
        yield
    finally:
        if names and record.active == active and not record.merged:  # none was set, deleted or merged inside
            _merge(root, record, names)


def first_of(record: Record, adapter_names: str | Iterable[str] | None) -> tuple[str, ...]:
    """The adapters that go into the weights, whose product must come before that of the others.

    Raises:
        AdapterError: no such adapter, none is active, all are switched off, or another one comes before.
    """
    if record.disabled:
        raise AdapterError(
            "adapters are switched off. Leave the disable_adapters block first, or call enable_adapter_layers()."
        )
    names = record.active if adapter_names is None else names_in(record, adapter_names)
    if not names:
        raise AdapterError("no adapter is active. Name one, or call hra_fx.set_adapter first.")
    inside = tuple(name for name in record.active if name in names)
    if inside != record.active[: len(inside)] or inside != tuple(name for name in names if name in inside):
        raise AdapterError(
            f"adapters {list(names)}: the model acts as W Q in the order {list(record.active)}, and what goes into the "
            "weights comes first. Name the first ones in that order, or call hra_fx.set_adapter with another order."
        )
    return names


def _merge(root: nn.Module, record: Record, names: tuple[str, ...]) -> None:
    sites = sites_of(root)
    check_copies(root, inventory(root), dict.fromkeys((*names, *record.active)))
    check_weights(root, sites)
    check_floating(sites, names, " Adapters act without a merge too.")
    new = {path: rotated(path, layer, names) for path, layer in sites.items() if any(n in layer.hra_u for n in names)}
    # All that needs memory before the first weight is written.
    old = {path: sites[path].hra_base.detach().clone() for path in new}
    others = tuple(name for name in record.active if name not in names)
    with torch.no_grad(), uninterrupted():
        for path, change in new.items():
            sites[path].hra_u.unmerged = old[path]
            sites[path].hra_base.copy_(change.weight)
        record.active, record.merged = names + others, names
        refresh(inventory(root), record)
