"""Add an adapter to layers of a model, with the vectors that a function adds to each of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn

from hra_fx.config import HRAConfig
from hra_fx.errors import HRAWarning
from hra_fx.layers.accelerate_hooks import keep_loaded
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters
from hra_fx.layers.classes import adapt_layer
from hra_fx.layers.target import REFLECTION
from hra_fx.layers.weight import mark_readers
from hra_fx.model.state import is_adapted

#: Adds one adapter to a layer: (path, layer, the adapters of the layer).
AdapterFactory: TypeAlias = Callable[[str, nn.Module, HouseholderAdapters], None]


def inject_adapter(modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module], fill: AdapterFactory) -> None:
    """Add an adapter to these layers of all `modules`, with the vectors from `fill`. The adapter is not active.

    After an error, some of the layers may have it.
    """
    new = {path: layer for path, layer in layers.items() if not is_adapted(layer)}
    for path, layer in layers.items():
        if path in new:
            adapt_layer(path, layer)
        adapters: Any = layer._modules[REFLECTION]
        keep_loaded(adapters)  # accelerate's hook would look for the new vectors among the offloaded tensors
        fill(path, layer, adapters)
    if new:
        mark_readers(modules, new)


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
