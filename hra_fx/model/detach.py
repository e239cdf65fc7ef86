"""Remove adapters from a model: some of them, or all together with everything that `transform` added."""

from __future__ import annotations

from torch import fx, nn

from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.class_swap import mixins_of, original_class, set_class
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.layers.trained_copies import all_copies, get_copies
from hra_fx.model.graph_module import restore, rewrite
from hra_fx.model.inject import remove_adapter_layer
from hra_fx.model.state import AdapterState, adapted_layers, clear_state, get_state
from hra_fx.model.trainable import FlagChanges, restore_ties


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
    """Remove adapters; a layer without adapters becomes a plain layer, a model without adapters a plain model.

    Check before with `check_no_foreign_class` that no other tool replaced a class; then nothing here fails.
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
