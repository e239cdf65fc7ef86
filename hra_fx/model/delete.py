"""Remove adapters: `delete_adapter` and related functions. A model without adapters is a plain model again."""

from __future__ import annotations

import warnings
from contextlib import ExitStack

from torch import fx, nn

from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.layers.class_swap import mixins_of, original_class, set_class
from hra_fx.layers.target import SAVED
from hra_fx.layers.trained_copies import all_copies
from hra_fx.model.graph_module import remove_reflections, rewrite
from hra_fx.model.inject import remove_adapter_layer
from hra_fx.model.offload import offloaded_copy
from hra_fx.model.state import (
    AdapterState,
    adapted_layers,
    check_no_foreign_class,
    clear_state,
    collect_parts,
    names_in,
    root_of,
)
from hra_fx.model.trainable import activate, restore_ties, sync_layers, unfreeze


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter. Layers without other adapters become plain layers.

    A model without other adapters becomes a plain model. If the adapter was the only active one, the first remaining
    adapter becomes active (as in PEFT).

    Raises:
        AdapterError: the model has no such adapter, adapters are merged, another tool replaced a class, or accelerate
            offloads trained copies.

    Warns:
        HRAWarning: another adapter becomes active.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> delete_adapter(model, "default")
        >>> list(model.state_dict())
        ['0.weight', '0.bias']
    """
    root, state = root_of(model)
    (name,) = names_in(state, adapter_name)
    if state.merged:
        raise AdapterError(f"adapters {list(state.merged)} are merged into the weights. Call unmerge_adapter first.")
    check_no_foreign_class(root)
    if reason := offloaded_copy(root):
        raise AdapterError(reason)
    was_active = name in state.active
    remove_adapters(root, state, (name,))
    following = next(iter(state.configs)) if was_active and not state.active and state.configs else None
    if following is not None:
        activate(collect_parts(root), state, (following,), trainable=not state.configs[following].inference_mode)
        text = f"adapter {name!r} was active and is deleted; {following!r} is active now."
        warnings.warn(text, HRAWarning, stacklevel=2)
    elif state.configs:
        sync_layers(collect_parts(root), state)


def remove_adapters(root: nn.Module, state: AdapterState, names: tuple[str, ...]) -> None:
    """Remove adapters. A layer or model without adapters becomes a plain one.

    First check with `check_no_foreign_class` that no other tool replaced a class. Then this function cannot fail.
    """
    for layer in adapted_layers(root).values():
        for name in names:
            layer.hra_u.remove(name)
    for owner, copies in all_copies(root).values():
        for name in names:
            copies.remove(owner, name)
        if not copies.copied:
            del owner._modules[SAVED]
    for name in names:
        del state.configs[name]
    state.active = tuple(name for name in state.active if name not in names)
    restore_ties(root, state)
    plain = [layer for layer in adapted_layers(root).values() if not layer.hra_u.specs]
    if plain and isinstance(root, fx.GraphModule):
        remove_reflections(root)
    for layer in plain:
        remove_adapter_layer(layer)
    if not state.configs:
        for part in root.modules():
            if mixins_of(part):
                set_class(part, original_class(part))
        unfreeze(root, state.frozen)
        clear_state(root)
    elif plain and isinstance(root, fx.GraphModule):
        rewrite(root, ExitStack())
