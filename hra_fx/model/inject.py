"""Add adapters to the layers of a model, and remove them: `delete_adapter`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from hra_fx.config import HRAConfig
from hra_fx.errors import HRAWarning, UnsupportedLayerError
from hra_fx.layers.accelerate_hooks import keep_loaded
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters, get_adapters
from hra_fx.layers.class_swap import mixins_of, original_class, set_class, swap, unswap
from hra_fx.layers.classes import adapters_for, layer_class_for
from hra_fx.layers.experts import attach, detach
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.readers import needs_parameters, writes_data
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.layers.trained_copies import all_copies
from hra_fx.layers.weight import mark_readers
from hra_fx.model.graph_module import rewrite
from hra_fx.model.state import (
    AdapterState,
    adapted_layers,
    check_unmerged,
    clear_state,
    collect_parts,
    is_adapted,
    names_in,
    root_of,
)
from hra_fx.model.trainable import activate, sync_layers, unfreeze
from hra_fx.model.whole import check_whole
from hra_fx.passes.fold import erase

#: Adds one adapter to a layer: (path, layer, the adapters of the layer).
AdapterFactory: TypeAlias = Callable[[str, nn.Module, HouseholderAdapters], None]


@contextmanager
def all_or_nothing() -> Iterator[ExitStack]:
    """Context manager with a stack of undo steps, which run if the block raises an error. Inference mode is off."""
    with torch.inference_mode(False), ExitStack() as undo:
        yield undo
        undo.pop_all()


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
        _make_plain(model, state, _remove(model, state, (name,)))
        raise


def inject_adapter(modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module], fill: AdapterFactory) -> None:
    """Add an adapter to these layers of all `modules`, with the vectors from `fill`. The adapter is not active.

    After an error, some of the layers may have it.
    """
    new = {path: layer for path, layer in layers.items() if not is_adapted(layer)}
    for path, layer in layers.items():
        if path in new:
            _attach(path, layer)
        adapters: Any = layer._modules[REFLECTION]
        keep_loaded(adapters)  # accelerate's hook would look for the new vectors among the offloaded tensors
        fill(path, layer, adapters)
    if new:
        _mark_readers(modules, new)


def random_init(name: str, config: HRAConfig, *, on_meta: bool) -> AdapterFactory:
    """Return a function that adds new vectors, initialized as configured."""
    warned = False

    def fill(path: str, layer: nn.Module, adapters: HouseholderAdapters) -> None:
        nonlocal warned
        r = config.rank_of(path)
        if config.init_weights and (config.apply_GS or r % 2) and not warned:
            warned, cause = True, "apply_GS=True" if config.apply_GS else f"r = {r} is odd"
            text = (
                f"adapter {name!r}: {cause}, so it does not start as the base model, and trains vectors, which learn "
                "less than pairs. Use an even r without Gram-Schmidt."
            )
            warnings.warn(text, HRAWarning, stacklevel=2)
        spec = AdapterSpec(r, config.apply_GS, config.init_weights, config.trains_pairs(path))
        weight, device = adapters.weight_of(layer), adapters.device_of(layer)
        adapters.add(name, spec, weight.dtype, device, on_meta=on_meta)

    return fill


def _attach(path: str, layer: nn.Module) -> None:
    adapters = adapters_for(layer)
    adapters.layer_path = path
    adapters.train(layer.training)
    layer.add_module(REFLECTION, adapters)
    try:
        swap(layer, layer_class_for(layer))
        if isinstance(layer, ExpertsWeight):
            attach(layer)
    except UnsupportedLayerError as error:
        del layer._modules[REFLECTION]
        raise UnsupportedLayerError(f"{path}: {error}") from error


def _mark_readers(modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> None:
    """Mark the modules that use weights of adapted layers in their code."""
    new = set(layers.values())
    # All paths of the new layers, also of shared ones, with the names that checkpoint wrappers insert; and of experts.
    places = {path: module for path, module in modules.items() if module in new} | dict(layers)
    around = {".".join(path.split(".")[:depth]) for path in places for depth in range(path.count(".") + 1)}
    owners = [modules[path] for path in sorted({"", *around}) if path in modules]
    for path, layer in places.items():
        adapters: Any = layer._modules[REFLECTION]
        for part in (layer, modules.get(path.rpartition(".")[0], layer)):
            if writes_data(original_class(part)) and not (part is layer and adapters.reflects_input):
                raise UnsupportedLayerError(
                    f"{path}: the forward of {type(part).__name__} uses the `data` of a weight. The weight is W Q "
                    "while the model runs, so a change would be lost. Leave the layer out with exclude_modules."
                )
    for owner in owners:
        if needs_parameters(original_class(owner)):
            for adapters in filter(None, map(get_adapters, owner.modules())):
                adapters.needs_parameter = True
    mark_readers(owners)


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
    (name,) = names_in(state, adapter_name)
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


def remove_adapters(root: nn.Module, state: AdapterState, names: tuple[str, ...]) -> None:
    """Remove adapters. A layer or model without adapters becomes a plain one.

    First check with `check_whole` that modules can be removed. Then this function cannot fail.
    """
    plain = _remove(root, state, names)
    if plain and isinstance(root, fx.GraphModule):
        erase(root)
    _make_plain(root, state, plain)
    if plain and state.configs and isinstance(root, fx.GraphModule):
        rewrite(root, ExitStack())


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


def _make_plain(root: nn.Module, state: AdapterState, layers: Iterable[AdaptedLayer]) -> None:
    """Restore the classes of layers without adapters; if there are no adapters, those of all modules, and all flags."""
    for layer in layers:
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
