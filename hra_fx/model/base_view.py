"""Temporarily restore the classes and children that a model had before it was transformed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from hra_fx.layers.adapted_layer import AdaptedLayer, layer_class_for
from hra_fx.layers.class_swap import set_class, unswap
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.model.state import RECORD


@contextmanager
def base_model_view(model: nn.Module) -> Iterator[None]:
    """Context manager in which the model is as before `transform`, except for trained copies that are in use."""
    with ExitStack() as restore:
        for module in list(model.modules()):
            if isinstance(module, AdaptedLayer) and REFLECTION in module._modules:
                restore.callback(set_class, module, type(module))
                unswap(module, layer_class_for(module))
            if SAVED in module._modules or REFLECTION in module._modules:
                restore.callback(_refill, module._modules, dict(module._modules))
                for child in (SAVED, REFLECTION):
                    module._modules.pop(child, None)
            if RECORD in vars(module):
                restore.callback(vars(module).__setitem__, RECORD, vars(module).pop(RECORD))
        yield


def _refill(children: dict[str, nn.Module | None], before: dict[str, nn.Module | None]) -> None:
    """Restore children in their previous order, which is the order of parameters and of optimizer states."""
    children.clear()
    children.update(before)
