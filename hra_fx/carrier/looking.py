"""A forward that is watched once, for reads of a weight by ways on which no reflection is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from hra_fx.errors import UnsupportedLayerError
from hra_fx.layers.adapted_layer import SiteCarrier
from hra_fx.overlooked import WeightWatch


def can_look() -> bool:
    """Whether a forward that starts now runs for itself, and not for a tracer."""
    return torch._C._get_tracing_state() is None and not is_fx_symbolic_tracing()


def look(
    module: nn.Module,
    sites: Mapping[str, SiteCarrier],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run `forward` of a module, and refuse its result where it read a weight by a way on which no reflection is.

    Where torch may take its fused path through `nn.TransformerEncoderLayer` nothing is watched, for it would not take
    it then, and give other values at padded places.

    Args:
        module: the module.
        sites: path -> layer, of those whose reads are to be seen.
        forward: its forward, unbound.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        UnsupportedLayerError: naming layer, reader and way out.
    """
    # Where an adapter does nothing, the weight that others are given is the very one that they must not take.
    watched = {path: layer for path, layer in sites.items() if layer.hra_u.acts or not layer.hra_u.on_weight}
    fused = not module.training and not torch.is_grad_enabled()
    if not watched or (fused and any(isinstance(part, nn.TransformerEncoderLayer) for part in module.modules())):
        return forward(module, *args, **kwargs)
    watch = WeightWatch(module, watched)
    with watch:
        result = forward(module, *args, **kwargs)
    for path, reader in watch.found.items():
        raise UnsupportedLayerError(_overlooked(path, reader, on_weight=watched[path].hra_u.on_weight))
    return result


def _overlooked(path: str, reader: str, *, on_weight: bool) -> str:
    again = "Take the adapters off (hra_fx.delete_adapter for each), and"
    if on_weight:
        return (
            f"{path}: {reader} reads its weight past the attribute, as _parameters or parameters() give it, where no "
            f"reflection can be seen. {again} leave the layer out with exclude_modules."
        )
    return (
        f"{path}: {reader} reads its weight, and neither a source nor a graph told so: its reflections act on what it "
        f"is called with, and are not seen there. {again} give hra_fx.transform or load_adapter example_inputs, "
        "a call in this mode, which shows the read: the weight is reflected then."
    )
