"""Layers as single operators while `torch.export` captures a model.

    y = layer(x)        is captured as        y = hra_fx.call_layer(x, "encoder.0.query")

`torch.export` records operators, in which layers can no longer be told apart. The operator stands for the call of a
layer, which the finished graph calls as a module. Dropout and batch norm are layers too, so that one graph is valid in
train and in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.layers.class_swap import original_class
from hra_fx.layers.target import find_kind
from hra_fx.tracing.unchanged import Snapshot

# torch has no types for its libraries.
_LIBRARY: Any = torch.library.Library("hra_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("call_layer(Tensor input, str path) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

#: The overload that is the target of graph nodes.
CALL_LAYER = torch.ops.hra_fx.call_layer.default

_MODES = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
)
#: Ends of the names of classes that drop whole examples, as torchvision, timm and transformers call them.
_DROP_PATHS = ("DropPath", "StochasticDepth")
#: Modules of `torch.nn.modules` with classes that take one tensor and return one.
_OF_TORCH = (
    *("activation", "channelshuffle", "flatten", "fold", "instancenorm", "normalization", "padding", "pixelshuffle"),
    *("pooling", "sparse", "upsampling"),
)
_SEVERAL = (nn.MultiheadAttention, nn.EmbeddingBag)
# The layers of the model that is being captured, by path. The lock of the capture is held.
_layers: dict[str, nn.Module] = {}


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph calls a module as a whole: layers of torch, and those that can be adapted.

    Example:
        >>> is_leaf(nn.Conv2d(3, 8, 3)), is_leaf(nn.LayerNorm(8)), is_leaf(nn.Sequential())
        (True, True, False)
    """
    if depends_on_mode(module) or find_kind(module) not in (None, "attention", "experts"):
        return True
    folder, _, file = original_class(module).__module__.rpartition(".")
    several = isinstance(module, _SEVERAL) or getattr(module, "return_indices", False)
    return folder == "torch.nn.modules" and file in _OF_TORCH and not several


def depends_on_mode(module: nn.Module) -> bool:
    """Whether a layer acts differently in train mode; its output has the shape of its input."""
    return isinstance(module, _MODES) or type(module).__name__.endswith(_DROP_PATHS)


@contextmanager
def layers_as_operators(model: nn.Module) -> Iterator[None]:
    """A block in which the call of each leaf of a model is one `hra_fx::call_layer`."""
    snapshot = Snapshot(model)
    _layers.update({path: part for path, part in model.named_modules() if path and is_leaf(part)})
    for path, layer in _layers.items():
        vars(layer)["forward"] = partial(_call, path)
    try:
        yield
    finally:
        snapshot.restore()
        _layers.clear()


def _call(path: str, *args: Any, **kwargs: Any) -> Any:
    given = (*args, *kwargs.values())
    layer = _layers[path]
    if len(given) != 1:
        return original_class(layer).forward(layer, *args, **kwargs)
    try:
        output = CALL_LAYER(given[0], path)
    except _SeveralOutputs:
        return original_class(layer).forward(layer, *args, **kwargs)
    if output.is_floating_point() and any(parameter.requires_grad for parameter in layer.parameters()):
        # A model may ask for it, add hooks, and write into the copy, which `canonical` removes.
        output = torch.ops.aten.clone.default(output.requires_grad_())
    return output


class _SeveralOutputs(Exception):
    """A layer returns more than one tensor, as routers that are an `nn.Linear` do; its operators are recorded."""


class _Called(nn.ModuleDict):
    """Calls a layer, so that it can be called with other tensors in place of its own."""

    def forward(self, x: Tensor) -> Any:
        layer = self["layer"]
        return original_class(layer).forward(layer, x)


def _output_of(x: Tensor, path: str) -> Tensor:
    """A tensor with the shape of a layer's output. Only fake tensors get here."""
    layer: Any = _layers[path]
    if depends_on_mode(layer):
        return torch.empty_like(x)
    tensors = layer.state_dict(keep_vars=True)
    if isinstance(layer, nn.Linear) and not layer.weight.is_floating_point():  # packed, so its shape says nothing
        return x.new_empty((*x.shape[:-1], layer.out_features))
    fake = {f"layer.{name}": x.new_empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}
    output = torch.func.functional_call(_Called({"layer": layer}), fake, (x,))
    if not isinstance(output, Tensor):
        raise _SeveralOutputs
    return output.clone()


_LIBRARY.impl("call_layer", _output_of, "CompositeExplicitAutograd")
torch.library.register_fake("hra_fx::call_layer", _output_of, lib=_LIBRARY)
