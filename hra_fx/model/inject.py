"""Add adapters to the layers of a model, where each step can be undone, and remove them: `delete_adapter`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from hra_fx.compat import state_paths
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError, HRAWarning, UnsupportedLayerError
from hra_fx.layers.accelerate_hooks import keep_loaded
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters
from hra_fx.layers.class_swap import mixins_of, original_class, set_class, swap, unswap
from hra_fx.layers.classes import adapters_for, layer_class_for
from hra_fx.layers.experts import attach, detach
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.readers import needs_parameter, why_lost
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.layers.trained_copies import all_copies
from hra_fx.layers.weight import mark_readers
from hra_fx.model.graph_module import rewrite
from hra_fx.model.state import (
    AdapterState,
    adapted_layers,
    check_no_foreign_class,
    clear_state,
    collect_parts,
    is_adapted,
    names_in,
    offloaded_copy,
    root_of,
)
from hra_fx.model.trainable import activate, sync_layers, unfreeze
from hra_fx.passes.fold import erase
from hra_fx.selection.check import select_checked

#: Adds one adapter to a layer: (path, layer, the adapters of the layer).
AdapterFactory: TypeAlias = Callable[[str, nn.Module, HouseholderAdapters], None]


@contextmanager
def all_or_nothing() -> Iterator[ExitStack]:
    """Context manager with a stack of undo steps, which run if the block raises an error.

    Inference mode is off in the block, because vectors created in inference mode could never be trained.
    """
    with torch.inference_mode(False), ExitStack() as undo:
        yield undo
        undo.pop_all()


def inject_adapter(
    model: nn.Module,
    name: str,
    config: HRAConfig,
    fill: AdapterFactory,
    undo: ExitStack,
    layers: dict[str, nn.Module] | None,
) -> dict[str, nn.Module]:
    """Add adapter `name` to every layer that `config` selects. The adapter is not active.

    `layers` is the result of `select_checked`, if the caller has it.
    """
    every = dict(model.named_modules(remove_duplicate=False))
    layers = select_checked(model, config, dict(state_paths(every.items()))) if layers is None else layers
    new = {path: layer for path, layer in layers.items() if not is_adapted(layer)}
    if new or config.modules_to_save or config.bias != "none":
        check_no_foreign_class(every.items())
    for path, layer in layers.items():
        if path in new:
            _attach(path, layer, undo)
        adapters: Any = layer._modules[REFLECTION]
        keep_loaded(adapters)  # accelerate's hook would look for the new vectors among the offloaded tensors
        undo.callback(adapters.remove, name)
        fill(path, layer, adapters)
    if new:
        _mark_readers(every, new, undo)
    if new and isinstance(model, fx.GraphModule):
        rewrite(model, undo)
    return layers


def random_init(name: str, config: HRAConfig, *, on_meta: bool) -> AdapterFactory:
    """Return a function that adds new vectors, initialized as configured."""

    def fill(path: str, layer: nn.Module, adapters: HouseholderAdapters) -> None:
        r = config.rank_of(path)
        spec = AdapterSpec(r, config.apply_GS, config.init_weights, config.trains_pairs(path))
        if config.pairs and not config.apply_GS and r % 2:
            text = (
                f"adapter {name!r}: r = {r} is odd, so it trains vectors, which learn less than pairs. Use an even r."
            )
            warnings.warn(text, HRAWarning, stacklevel=2)
        weight, device = adapters.weight_of(layer), adapters.device_of(layer)
        adapters.add(name, spec, weight.dtype, device, on_meta=on_meta)

    return fill


def _attach(path: str, layer: nn.Module, undo: ExitStack) -> None:
    adapters = adapters_for(layer)
    adapters.layer_path = path
    adapters.train(layer.training)
    undo.callback(layer._modules.pop, REFLECTION, None)
    layer.add_module(REFLECTION, adapters)
    try:
        undo.callback(unswap, layer, layer_class_for(layer))
        swap(layer, layer_class_for(layer))
        if isinstance(layer, ExpertsWeight):
            attach(layer)
            undo.callback(detach, layer)
    except UnsupportedLayerError as error:
        raise UnsupportedLayerError(f"{path}: {error}") from error


def _mark_readers(modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module], undo: ExitStack) -> None:
    """Find the modules that read or write weights of adapted layers in their code."""
    new = set(layers.values())
    # All paths of the new layers, also of shared ones, with the names that checkpoint wrappers insert.
    paths = [path for path, module in modules.items() if module in new]
    around = {".".join(path.split(".")[:depth]) for path in paths for depth in range(path.count(".") + 1)}
    owners = [modules[path] for path in sorted({"", *around})]
    classes = set(map(original_class, owners))
    for path, layer in layers.items():
        adapters: Any = layer._modules[REFLECTION]
        names = {place.rpartition(".")[2] for place in paths if modules[place] is layer}
        own = None if adapters.reflects_input else original_class(layer)  # the class of a forward that reads W Q
        if written := why_lost(names, classes, own):
            raise UnsupportedLayerError(
                f"{path} ({type(layer).__name__}): {written}. Leave it out with exclude_modules."
            )
        adapters.needs_parameter = needs_parameter(names, classes)
    mark_readers(owners, undo)


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
    check_no_foreign_class(root.named_modules())
    if reason := offloaded_copy(root):
        raise AdapterError(reason)
    was_active = name in state.active
    remove_adapters(root, state, (name,))
    following = next(iter(state.configs), None) if was_active and not state.active else None
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
    plain = [layer for layer in adapted_layers(root).values() if not layer.hra_u.specs]
    if plain and isinstance(root, fx.GraphModule):
        erase(root)
    for layer in plain:
        unswap(layer, layer_class_for(layer))
        del layer._modules[REFLECTION]
        if isinstance(layer, ExpertsWeight):
            detach(layer)
    if not state.configs:
        for part in root.modules():
            if mixins_of(part):
                set_class(part, original_class(part))
        unfreeze(root, state.frozen)
        clear_state(root)
    elif plain and isinstance(root, fx.GraphModule):
        rewrite(root, ExitStack())  # the undo steps are not needed
