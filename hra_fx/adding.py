"""`add_adapter`, `delete_adapter` and `combine`: several adapters on one model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hra_fx import householder
from hra_fx.acting import activate, refresh
from hra_fx.adapted import Record, inventory, names_in, root_of, sites_of
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.installing import Fill, all_or_nothing, drawn, introduce, settle
from hra_fx.reflection import AdapterSpec, Reflection
from hra_fx.releasing import forget
from hra_fx.selection import with_head
from hra_fx.site import SiteLayer
from hra_fx.trainable import give_gradients, make_copies
from hra_fx.transforming import checked


def add_adapter(model: nn.Module, adapter_name: str, config: HRAConfig, *, low_cpu_mem_usage: bool = False) -> None:
    """Add another adapter to a transformed model: its own layers, rank and Gram-Schmidt. It is not active yet.

    Args:
        model: a transformed model.
        adapter_name: its name.
        config: as for `transform`.
        low_cpu_mem_usage: make its vectors on the meta device, to be loaded into.

    Raises:
        AdapterError: the name is taken, or adapters are merged.
        ConfigError, SelectionError, UnsupportedLayerError: as `transform`.
        After any error the model is as it was.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), HRAConfig(r=2, target_modules=["0"]))
        >>> add_adapter(model, "other", HRAConfig(r=3, target_modules=["0", "1"]))
        >>> [name for name, _ in model.named_parameters() if "hra_u" in name]
        ['0.hra_u.default', '0.hra_u.other', '1.hra_u.other']
    """
    root, record = root_of(model)
    config = with_head(root, checked(root, config, adapter_name))
    put_beside(root, record, adapter_name, config, drawn(adapter_name, config, on_meta=low_cpu_mem_usage))


def put_beside(root: nn.Module, record: Record, adapter_name: str, config: HRAConfig, fill: Fill) -> None:
    """Add an adapter whose vectors `fill` gives; errors as `add_adapter`."""
    if adapter_name in record.configs:
        raise AdapterError(
            f"adapter {adapter_name!r}: the model has it already. Delete it first, or choose another name."
        )
    if record.merged:
        raise AdapterError(f"adapters {list(record.merged)} are merged into the weights. Call unmerge_adapter first.")
    with all_or_nothing() as undo:
        layers, findings = introduce(root, adapter_name, config, fill, undo)
        make_copies(root, adapter_name, config, layers, record, undo)
        record.configs[adapter_name] = config
        undo.callback(record.configs.pop, adapter_name, None)
        parts = inventory(root)
        give_gradients(parts, (adapter_name,), False)
        refresh(parts, record)
        if findings:
            settle(root)
            record.alone = findings.alone


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter off; layers without another one are plain again, and with the last adapter the whole model is.

    Where it was the only active one, the first that is left becomes active (as in PEFT).

    Raises:
        AdapterError: there is no such adapter, or it is merged.

    Warns:
        HRAWarning: another adapter becomes active.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> delete_adapter(model, "default")
        >>> list(model.state_dict())
        ['0.weight', '0.bias']
    """
    root, record = root_of(model)
    (name,) = names_in(record, adapter_name)
    if record.merged:
        raise AdapterError(f"adapters {list(record.merged)} are merged into the weights. Call unmerge_adapter first.")
    was_active = name in record.active
    forget(root, record, (name,))
    if not record.configs:
        return
    if record.active or not was_active:
        refresh(inventory(root), record)
        return
    following = next(iter(record.configs))
    text = f"adapter {name!r} was active and is deleted; {following!r} is active now."
    warnings.warn(text, HRAWarning, stacklevel=2)
    activate(inventory(root), record, (following,), trainable=not record.configs[following].inference_mode)


def combine(model: nn.Module, adapters: Sequence[str], adapter_name: str) -> None:
    """Make one new adapter of several: `Q = Q_a Q_b ...`, exactly, by `r_a + r_b + ...` plain reflections.

    An anchored adapter counts with its anchor, and every adapter with the strength that it has now. The new one is not
    active yet; it has no Gram-Schmidt, and the layers of all. Where a layer lacks one of them, pairs of equal
    reflections, which cancel, fill up its rank.

    Args:
        model: a transformed model.
        adapters: names, in the order of the product.
        adapter_name: name of the new adapter.

    Raises:
        AdapterError: there is no such adapter, fewer than two are named, one has copies (`modules_to_save` or `bias`),
            or a layer would have to be filled up by an odd number.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]), "a")
        >>> add_adapter(model, "b", HRAConfig(r=4, target_modules=["0"]))
        >>> combine(model, ["a", "b"], "ab")
        >>> model[0].hra_u["ab"].shape
        torch.Size([6, 6])
    """
    root, record = root_of(model)
    names = names_in(record, adapters)
    if len(names) < 2:
        raise AdapterError(f"combine: {list(names)} is fewer than two adapters. Name those to combine, in their order.")
    for name in names:
        config = record.configs[name]
        if config.modules_to_save or config.bias != "none":
            raise AdapterError(f"adapter {name!r}: it has trained copies of modules or biases, which have no product.")
    chains = {
        path: [layer.hra_u.chain(name).detach() for name in names if name in layer.hra_u]
        for path, layer in sites_of(root).items()
        if any(name in layer.hra_u for name in names)
    }
    rank = max(sum(chain.shape[1] for chain in parts) for parts in chains.values())
    joint = {path: _filled(path, torch.cat(parts, dim=1), rank) for path, parts in chains.items()}
    config = dataclasses.replace(
        record.configs[names[0]],
        r=rank,
        apply_GS=False,
        init_weights=True,
        target_modules=list(chains),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    spec = AdapterSpec(rank)

    def fill(path: str, layer: SiteLayer, reflection: Reflection) -> None:
        reflection.put(adapter_name, spec, joint[path], None)

    put_beside(root, record, adapter_name, checked(root, config, adapter_name), fill)


def _filled(path: str, chain: Tensor, rank: int) -> Tensor:
    missing = rank - chain.shape[1]
    if not missing:
        return chain
    if missing % 2:
        raise AdapterError(
            f"{path}: it has {chain.shape[1]} reflections of these adapters and others have {rank}. Reflections that "
            "cancel come in pairs, so the difference must be even: combine adapters of even ranks."
        )
    pairs = householder.start(chain.shape[0], missing, apply_GS=False, init_weights=True, dtype=chain.dtype)
    return torch.cat([chain, pairs.to(chain.device)], dim=1)
