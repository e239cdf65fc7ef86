"""Remove adapters: `delete_adapter` and related functions. A model without adapters is a plain model again."""

from __future__ import annotations

import warnings

from torch import fx, nn

from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.class_swap import mixins_of, original_class, set_class
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.layers.trained_copies import all_copies, get_copies
from hra_fx.model.graph_module import restore, rewrite
from hra_fx.model.inject import remove_adapter_layer
from hra_fx.model.offload import offloaded_copy
from hra_fx.model.state import (
    AdapterState,
    adapted_layers,
    check_no_foreign_class,
    clear_state,
    collect_parts,
    get_state,
    names_in,
    root_of,
)
from hra_fx.model.trainable import FlagChanges, activate, restore_ties, sync_layers


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
    check_no_foreign_class(dict(root.named_modules()))
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


def detach_all(model: nn.Module) -> None:
    """Restore the classes, children and `requires_grad` flags from before `transform`. Tensors are not changed."""
    restore(model)
    parts = list(model.modules())
    for part in parts:
        if REFLECTION in part._modules and isinstance(part._modules[REFLECTION], HouseholderAdapters):
            del part._modules[REFLECTION]
        if get_copies(part) is not None:
            del part._modules[SAVED]
        if mixins_of(part):
            set_class(part, original_class(part))
        if isinstance(part, ExpertsWeight):
            part.owner._modules.pop(part.child, None)
    for part in parts:
        if state := get_state(part):
            FlagChanges(state.requires_grad).restore(part)
            clear_state(part)


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
    if not state.configs:
        detach_all(root)
        return
    plain = [layer for layer in adapted_layers(root).values() if not layer.hra_u.specs]
    if plain and isinstance(root, fx.GraphModule):
        restore(root)
    for layer in plain:
        remove_adapter_layer(layer)
    if plain and isinstance(root, fx.GraphModule):
        rewrite(root)
