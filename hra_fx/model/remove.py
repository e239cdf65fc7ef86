"""Remove adapters: `delete_adapter`, and what could not be added."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn

from hra_fx.config import HRAConfig
from hra_fx.errors import HRAWarning
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.class_swap import mixins_of, original_class, set_class
from hra_fx.layers.classes import make_plain
from hra_fx.layers.target import SAVED
from hra_fx.layers.trained_copies import all_copies
from hra_fx.model.graphs import rewrite
from hra_fx.model.state import (
    AdapterState,
    adapted_layers,
    check_unmerged,
    clear_state,
    collect_parts,
    name_in,
    root_of,
)
from hra_fx.model.trainable import activate, sync_layers, unfreeze
from hra_fx.model.whole import check_whole
from hra_fx.passes.fold import erase


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter. Layers without other adapters become plain layers.

    A model without other adapters becomes a plain model. If the adapter was the only active one, the first remaining
    adapter becomes active (as in PEFT).

    Raises:
        AdapterError: the model has no such adapter, adapters are merged, the model is sharded, another tool replaced a
            class, or accelerate offloads trained copies.

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
    name = name_in(state, adapter_name)
    check_unmerged(state)
    check_whole(root, "remove its adapters", "modules")
    was_active = name in state.active
    remove_adapters(root, state, (name,))
    following = next(iter(state.configs), None) if was_active and not state.active else None
    if following is not None:
        activate(collect_parts(root), state, (following,), trainable=not state.configs[following].inference_mode)
        text = f"adapter {name!r} was active and is deleted; {following!r} is active now."
        warnings.warn(text, HRAWarning, stacklevel=2)
    elif state.configs:
        sync_layers(collect_parts(root), state)


@contextmanager
def removed_on_error(model: nn.Module, state: AdapterState, name: str, config: HRAConfig) -> Iterator[None]:
    """Context manager that adds an adapter to the state. If the block raises an error, the adapter is removed.

    Inference mode is off in the block, because vectors created in inference mode could never be trained.
    """
    state.configs[name] = config
    try:
        with torch.inference_mode(False):
            yield
    except BaseException:
        _restore(model, state, _remove(model, state, (name,)))
        raise


def remove_adapters(root: nn.Module, state: AdapterState, names: tuple[str, ...]) -> None:
    """Remove adapters. A layer or model without adapters becomes a plain one.

    First check with `check_whole` that modules can be removed. Then this function cannot fail.
    """
    plain = _remove(root, state, names)
    if plain and isinstance(root, fx.GraphModule):
        erase(root)
    _restore(root, state, plain)
    if plain and state.configs and isinstance(root, fx.GraphModule):
        rewrite(root)


def _remove(root: nn.Module, state: AdapterState, names: tuple[str, ...]) -> list[AdaptedLayer]:
    """Remove the tensors of adapters. Returns the layers without other adapters."""
    layers = adapted_layers(root).values()
    for layer in layers:
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
    return [layer for layer in layers if not layer.hra_u.specs]


def _restore(root: nn.Module, state: AdapterState, layers: Iterable[AdaptedLayer]) -> None:
    """Restore the classes of layers without adapters; without any adapter, those of all modules, and all flags."""
    for layer in layers:
        make_plain(layer)
    if not state.configs:
        for part in root.modules():
            if mixins_of(part):
                set_class(part, original_class(part))
        unfreeze(root, state.frozen)
        clear_state(root)
