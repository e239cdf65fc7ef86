"""Add adapters to the layers of a model; each step can be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from hra_fx.config import HRAConfig
from hra_fx.errors import UnsupportedLayerError
from hra_fx.layers.accelerate_hooks import keep_loaded
from hra_fx.layers.adapted_experts import attach, detach
from hra_fx.layers.adapted_layer import layer_class_for
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters
from hra_fx.layers.base_parameters import swap_tied_modules
from hra_fx.layers.class_swap import swap, unswap
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.sharding import is_dtensor
from hra_fx.layers.target import REFLECTION
from hra_fx.layers.tensor_parallel import call_adapted_class, replicate
from hra_fx.layers.variants import adapters_for
from hra_fx.model.graph_module import rewrite
from hra_fx.model.state import check_no_foreign_class, is_adapted
from hra_fx.selection.check import select_checked

#: Adds an adapter to the container of a layer: (path, layer, container).
AdapterFactory: TypeAlias = Callable[[str, nn.Module, HouseholderAdapters], None]


@contextmanager
def all_or_nothing() -> Iterator[ExitStack]:
    """Context manager with a stack of undo steps, which run if the block raises an error.

    Inference mode is off in the block, because vectors created in inference mode could never be trained.
    """
    with torch.inference_mode(False), ExitStack() as undo:
        yield undo
        undo.pop_all()


def complete(act: Callable[[], None]) -> None:
    """Call `act`, and call it again if it is interrupted (Ctrl-C) at any point, so that it always completes."""
    try:
        act()
    except BaseException:
        act()
        raise


def inject_adapter(
    model: nn.Module,
    name: str,
    config: HRAConfig,
    fill: AdapterFactory,
    undo: ExitStack,
    layers: dict[str, nn.Module] | None = None,
) -> dict[str, nn.Module]:
    """Add adapter `name` to every layer that `config` selects. The adapter is not active.

    `layers` is the result of `select_checked`, if the caller has it.
    """
    layers = select_checked(model, config) if layers is None else layers
    new = {path: layer for path, layer in layers.items() if not is_adapted(layer)}
    if new or config.modules_to_save or config.bias != "none":
        check_no_foreign_class(model)
    for path, layer in layers.items():
        if path in new:
            _attach(path, layer, undo)
        reflection: Any = layer._modules[REFLECTION]
        keep_loaded(reflection)  # its hook would search the new vectors among the tensors that it offloaded
        undo.callback(reflection.remove, name)
        fill(path, layer, reflection)
        if is_dtensor(reflection.weight_of(layer)):
            replicate(reflection, reflection.weight_of(layer))
    if new:
        swap_tied_modules(model.modules(), new.values(), undo)
    if new and isinstance(model, fx.GraphModule):
        rewrite(model, undo)
    return layers


def random_init(name: str, config: HRAConfig, *, on_meta: bool) -> AdapterFactory:
    """Create new vectors, initialized as configured."""

    def fill(path: str, layer: nn.Module, reflection: HouseholderAdapters) -> None:
        spec = AdapterSpec(config.rank_of(path), config.apply_GS, config.init_weights)
        weight, device = reflection.weight_of(layer), reflection.device_of(layer)
        reflection.add(name, spec, weight.dtype, device, on_meta=on_meta)

    return fill


def remove_adapter_layer(layer: nn.Module) -> None:
    """Make an adapted layer a plain layer again."""
    unswap(layer, layer_class_for(layer))
    del layer._modules[REFLECTION]
    if isinstance(layer, ExpertsWeight):
        detach(layer)


def _attach(path: str, layer: nn.Module, undo: ExitStack) -> None:
    reflection = adapters_for(layer)
    reflection.layer_path = path
    reflection.train(layer.training)
    undo.callback(layer._modules.pop, REFLECTION, None)
    layer.add_module(REFLECTION, reflection)
    mixin = layer_class_for(layer)
    try:
        swap(layer, mixin)
        undo.callback(unswap, layer, mixin)
        call_adapted_class(layer)
        if isinstance(layer, ExpertsWeight):
            attach(layer)
            undo.callback(detach, layer)
    except UnsupportedLayerError as error:
        raise UnsupportedLayerError(f"{path}: {error}") from error
