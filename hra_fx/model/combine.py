"""`combine`: add an adapter that is the product of several."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hra_fx.errors import AdapterError
from hra_fx.functional.chain import padded
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters
from hra_fx.layers.sharding import first_sharded
from hra_fx.layers.target import weight_entry
from hra_fx.model.setup import add_filled_adapter, checked
from hra_fx.model.state import (
    AdapterState,
    adapted_layers,
    load_vectors,
    names_in,
    root_of,
)


def combine(model: nn.Module, adapters: Sequence[str], adapter_name: str) -> None:
    """Add an adapter that is the exact product of several, `Q = Q_a Q_b ...`, with `r_a + r_b + ...` reflections.

    Anchors and the current scales are included. The new adapter is not active, does not use Gram-Schmidt, and is
    on every layer that has at least one of the adapters. If a layer does not have all of them, its vectors are padded
    with pairs of equal reflections, which cancel.

    Args:
        model: a transformed model.
        adapters: names of the adapters, in the order of the product.
        adapter_name: name of the new adapter.

    Raises:
        AdapterError: the model has no such adapter, there are fewer than two names, an adapter has trained copies
            (`modules_to_save` or `bias`), a layer would need an odd number of padding reflections, all adapters
            have scale 0, or the vectors are sharded.

    Example:
        >>> from hra_fx import HRAConfig, add_adapter, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]), "a")
        >>> add_adapter(model, "b", HRAConfig(r=4, target_modules=["0"]))
        >>> combine(model, ["a", "b"], "ab")
        >>> model[0].hra_u["ab"].shape
        torch.Size([6, 6])
    """
    root, state = root_of(model)
    names = names_in(state, adapters)
    if len(names) < 2:
        raise AdapterError(f"combine needs at least two adapters, got {list(names)}.")
    for name in names:
        config = state.configs[name]
        if config.modules_to_save or config.bias != "none":
            raise AdapterError(
                f"adapter {name!r}: it has trained copies of modules or biases, which cannot be combined."
            )
    if sharded := first_sharded(root):
        raise AdapterError(
            f"{sharded[0]}: {sharded[1]} shards its parameters and would not manage the new vectors. Combine before "
            "sharding."
        )
    load_vectors(root)
    with torch.inference_mode(False):
        _combine(root, state, names, adapter_name)


def _combine(root: nn.Module, state: AdapterState, names: tuple[str, ...], adapter_name: str) -> None:
    chains = {
        path: [layer.hra_u.chain(name).detach() for name in names if name in layer.hra_u]
        for path, layer in adapted_layers(root).items()
        if any(name in layer.hra_u for name in names)
    }
    rank = max(sum(chain.shape[-1] for chain in parts) for parts in chains.values())
    if not rank:
        raise AdapterError(
            f"adapters {list(names)}: all have scale 0, so their product is the identity. Call hra_fx.set_scale."
        )
    joint = {path: _padded(path, torch.cat(parts, dim=-1), rank) for path, parts in chains.items()}
    stacked = [path for path, layer in adapted_layers(root).items() if path in chains and layer.hra_u.kind == "experts"]
    config = dataclasses.replace(
        state.configs[names[0]],
        r=rank,
        rank_pattern={},
        apply_GS=False,
        init_weights=True,
        # A pattern: in a list, a path would also match longer paths that end like it.
        target_modules="|".join(re.escape(path) for path in chains if path not in stacked) or None,
        target_parameters=[weight_entry(path, adapted_layers(root)[path]) for path in stacked] or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    spec = AdapterSpec(rank, init_weights=False)

    def fill(path: str, layer: nn.Module, adapters: HouseholderAdapters) -> None:
        adapters.put(adapter_name, spec, joint[path], None)

    add_filled_adapter(root, state, adapter_name, checked(root, config, adapter_name), fill)


def _padded(path: str, chain: Tensor, rank: int) -> Tensor:
    try:
        return padded(chain, rank)
    except ValueError as error:
        raise AdapterError(
            f"{path}: it has {chain.shape[-1]} reflections of these adapters, but other layers have {rank}. The "
            "difference must be even, because layers are padded with pairs that cancel. Combine adapters of even ranks."
        ) from error
