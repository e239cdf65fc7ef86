"""Find layers that PEFT's LoRA does not support, or computes differently.

PEFT's LoRA only works if a layer is called, so it has no effect if another module reads the weight. An export does not
have inputs to run the model, so the code of the modules is used to find layers that they read and never call.
Other reads, such as a read in one branch and a call in another, are only known after the adapted model has run
(`HouseholderAdapters.is_read`).
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from hra_fx.compat import state_modules
from hra_fx.errors import UnsupportedLayerError
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.class_swap import original_class
from hra_fx.layers.readers import methods_of_forward
from hra_fx.layers.target import REFLECTION, describe, find_kind, weight_name
from hra_fx.model.state import AdapterState, adapted_layers, layers_with
from hra_fx.model.trainable import check_copies
from hra_fx.model.whole import check_whole

_ATTENTION = "is an nn.MultiheadAttention or its output projection, whose change PEFT's LoRA (0.21) adds twice"
_OWN_FORWARD = "has its own forward, for which PEFT's LoRA may compute something else"
_READ = "has a weight that another module reads, so PEFT's LoRA has no effect"


def unsupported(path: str, description: str, reason: str) -> UnsupportedLayerError:
    """The error for a layer that LoRA does not support."""
    return UnsupportedLayerError(
        f"{path}: {description} {reason}. Fold the model instead (hra_fx.fold), or leave the layer out with "
        "exclude_modules."
    )


def _why_not_convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    """The end of a sentence; `None` if LoRA supports the convolution."""
    if layer.groups > 1:
        return "has groups, so the change of its weight is not a LoRA of this rank"
    if any(step > 1 and size > 1 for step, size in zip(layer.dilation, layer.kernel_size, strict=True)):
        return "is dilated, which PEFT's LoRA does not support"
    if layer.padding_mode != "zeros" and layer.padding not in ("valid", (0,) * len(layer.kernel_size)):
        return f"has padding_mode={layer.padding_mode!r}, but PEFT's LoRA always pads with zeros"
    return None


def check_expressible(path: str, layer: AdaptedLayer, parent: nn.Module) -> None:
    """Check that PEFT's LoRA supports a layer and computes the same."""
    adapters, reason = layer.hra_u, None
    if adapters.kind == "experts":
        return
    if adapters.kind == "attention" or isinstance(parent, nn.MultiheadAttention):
        reason = _ATTENTION
    elif isinstance(parent, nn.TransformerEncoderLayer):
        reason = _READ
    elif not adapters.reflects_input:
        reason = _OWN_FORWARD
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        reason = _why_not_convolution(layer)
    if reason:
        raise unsupported(path, describe(layer), reason)


def check_places(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Check that no layer belongs to several modules of the whole model: PEFT's LoRA would replace it in one only."""
    paths = {layer: path for path, layer in layers.items()}
    owners: dict[str, list[str]] = {}
    for owner, module in model.named_modules():
        for name, child in module._modules.items():
            if child in paths:
                owners.setdefault(paths[child], []).append(f"{owner}.{name}".lstrip("."))
    for path, places in owners.items():
        if len(places) > 1:
            reason = f"is also {', '.join(places[1:])}, but PEFT's LoRA would change it in one place only"
            raise unsupported(path, "this layer", reason)


def check_reads(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Check that no other module of the whole model reads the weight of a layer."""
    owners = dict(state_modules(model, remove_duplicate=False))
    for path, layer in layers.items():
        seen = getattr(layer._modules.get(REFLECTION), "is_read", False)
        if seen or _is_only_read(path, layer, owners):
            raise unsupported(path, describe(layer), _READ)


def _is_only_read(path: str, layer: nn.Module, owners: Mapping[str, nn.Module]) -> bool:
    """Whether the code of the modules around a layer uses its weight, but never calls the layer."""
    *places, name = path.split(".")
    around = [owners[".".join(places[:depth])] for depth in range(len(places) + 1)]
    code = "".join(_source(cls) for cls in {original_class(owner) for owner in around})
    weight = weight_name(find_kind(layer) or "linear")
    reads = re.search(rf"\.{re.escape(name)}\.{weight}\b(?!\.(dtype|device|shape))", code)
    return reads is not None and not re.search(rf"\.{re.escape(name)}(\.forward)?\(", code)


def _source(cls: type[nn.Module]) -> str:
    """The code that the forward of a class may run, as far as it is known."""
    code = []
    for name in dict(methods_of_forward(cls)):
        for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
            held: Any = vars(base).get(name)
            with contextlib.suppress(OSError, TypeError):
                code.append(inspect.getsource(getattr(held, "fget", held)))
    return "".join(code)


def checked_layers(root: nn.Module, state: AdapterState, names: tuple[str, ...]) -> dict[str, AdaptedLayer]:
    """The layers with at least one of the adapters, by path. LoRA must support all of them."""
    check_whole(root, "convert its adapters to LoRA", "weights")
    check_copies(root, names)
    paths = {path for name in names for path in layers_with(root, state, name)}
    layers = {path: layer for path, layer in adapted_layers(root).items() if path in paths}
    for path, layer in layers.items():
        check_expressible(path, layer, root.get_submodule(path.rpartition(".")[0]))
    return layers
