"""The largest parts of a model that fx can trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

from torch import fx, nn

from hra_fx.errors import CaptureError
from hra_fx.layers.class_swap import original_class
from hra_fx.model.base_view import base_model_view
from hra_fx.model.state import adapted_layers
from hra_fx.tracing.trace import Traced, trace


@dataclass
class Captured:
    """What fx traces of a model.

    Attributes:
        parts: path of a module -> its graph. The only key is `""` if the whole model is traced.
        reasons: path of a layer -> why no larger graph contains it; `""` if it is in the graph of the whole model.
        roots: path of a layer -> path of the module whose graph contains it, or `None`.
    """

    parts: dict[str, Traced] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    roots: dict[str, str | None] = field(default_factory=dict)


def capture(model: nn.Module, layers: Mapping[str, nn.Module]) -> Captured:
    """Trace the whole model, or the largest parts of it that fx can trace.

    Args:
        model: the model; it is not changed.
        layers: path -> layer that must stay a call.
    """
    search = _Search(layers)
    with base_model_view(model):
        search.visit("", model, "")
    return search.found


def capture_layers(model: nn.Module) -> dict[str, tuple[str | None, str]]:
    """How much of a transformed model fx can trace.

    Returns:
        Path of an adapted layer -> (path of the module whose graph contains it, or `None`; why no larger graph does).

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
        >>> capture_layers(model)
        {'0': ('', '')}
    """
    found = capture(model, adapted_layers(model))
    return {path: (root, found.reasons[path]) for path, root in found.roots.items()}


class _Search:
    """A walk from the model down to its layers that stops at each module that can be traced."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.found = Captured()
        # A shared layer has several paths, and one name.
        self._names = {layer: path for path, layer in layers.items()}

    def visit(self, path: str, module: nn.Module, why: str) -> None:
        """Visit a module; `why` is the reason why its parent has no graph."""
        below = [part for part in module.modules() if part in self._names]
        if not below:
            return
        if module in self._names:
            self._note(below, None, why)
            return
        # A graph of one layer is no larger than that of the layer alone, and a container is never called.
        if path and (len(below) == 1 or type(module).forward is nn.Module.forward):
            self._visit_children(path, module, why)
            return
        try:
            self.found.parts[path] = _trace(path, module, below)
        except CaptureError as error:
            reason = f"{path or 'the model'} ({original_class(module).__name__}): {error.reason}"
            self._visit_children(path, module, reason)
        else:
            self._note(below, path, why)

    def _visit_children(self, path: str, module: nn.Module, why: str) -> None:
        for name, child in module.named_children():
            self.visit(f"{path}.{name}".lstrip("."), child, why)

    def _note(self, layers: list[nn.Module], root: str | None, why: str) -> None:
        for layer in layers:
            self.found.roots.setdefault(self._names[layer], root)
            self.found.reasons.setdefault(self._names[layer], why)


def _trace(path: str, module: nn.Module, layers: list[nn.Module]) -> Traced:
    if "forward" in vars(module):
        raise CaptureError("its forward is set on the instance")
    if isinstance(module, fx.GraphModule) and path:
        raise CaptureError("it is a GraphModule itself")
    if path and (optional := _optional_arguments(module)):
        names = ", ".join(optional)
        raise CaptureError(f"forward has optional arguments ({names}), and it is unknown how it is called")
    return trace(module, layers)


def _optional_arguments(module: Any) -> list[str]:
    """Arguments with defaults. For a submodule it is not known whether its callers pass them."""
    parameters = list(signature(type(module).forward).parameters.values())[1:]
    return [parameter.name for parameter in parameters if parameter.default is not Parameter.empty]
