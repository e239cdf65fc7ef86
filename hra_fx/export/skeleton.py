"""A skeleton model for a captured graph, on which `target_modules` are selected.

A captured graph has no layers. The skeleton has a module for each path in its names, with the weights in layers of the
kinds that use them, so a configuration selects the same layers, with the same errors, as in the original model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hra_fx.export.match import GraphLayer
from hra_fx.layers.target import LayerKind, weight_name

#: The output layers of transformers' models (get_output_embeddings).
OUTPUTS = ("lm_head", "lm_head.decoder", "cls.predictions.decoder", "embed_out", "proj_out", "output_projection")
CONVOLUTIONS: dict[LayerKind, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
}


def build_skeleton(
    layers: Mapping[str, GraphLayer], tensors: Mapping[str, Tensor], classes: Mapping[str, str], *, with_output: bool
) -> nn.Module:
    """The skeleton of a graph: a model that shares the weights of the graph and cannot be run.

    Args:
        layers: layer path -> layer.
        tensors: qualified name -> parameter, for all parameters of the graph.
        classes: module path -> qualified class name, as far as the graph has them.
        with_output: whether the output layer of a transformers model counts as a layer.
    """
    root_class = classes.get("", "Module")
    modules: dict[str, nn.Module] = {}
    first = {alias: path for path, layer in layers.items() for alias in layer.aliases}
    for path in _paths([*tensors, *(f"{path}." for path in classes)]):
        layer = layers.get(path)
        is_output = path in OUTPUTS and root_class.startswith("transformers.")
        if path in first:
            modules[path] = modules[first[path]]
        elif layer is None or not layer.is_candidate or (is_output and not with_output):
            modules[path] = _placeholder(classes.get(path, "Module"))
        else:
            modules[path] = _make_layer(layer, tensors[layer.name].detach())
        if path:
            parent, _, child = path.rpartition(".")
            modules[parent]._modules[child] = modules[path]
    if model_type := model_type_of(root_class):
        modules[""].config = {"model_type": model_type}  # type: ignore[assignment]
    return modules[""]


def _paths(names: Iterable[str]) -> list[str]:
    """The paths of all modules in the names, parents first."""
    paths: dict[str, None] = {"": None}
    for name in names:
        parts = name.split(".")[:-1]
        paths |= dict.fromkeys(".".join(parts[: length + 1]) for length in range(len(parts)))
    return list(paths)


def _placeholder(kind: str) -> nn.Module:
    """An empty module of a class with this name."""
    module: nn.Module = type(kind.rpartition(".")[2], (nn.Module,), {})()
    return module


def _make_layer(layer: GraphLayer, weight: Tensor) -> nn.Module:
    """A layer of the right kind with this weight; its other settings are arbitrary."""
    weight = weight.mT if layer.transposed else weight
    shape: Any = weight.shape
    module: nn.Module
    if layer.kind in CONVOLUTIONS:
        module = CONVOLUTIONS[layer.kind](shape[1], shape[0], tuple(shape[2:]), bias=False, device="meta")
    elif layer.kind == "attention":
        module = nn.MultiheadAttention(shape[1], 1, bias=False, device="meta")
    else:
        module = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    module._parameters[weight_name(layer.kind)] = nn.Parameter(weight, requires_grad=False)
    return module


def model_type_of(kind: str) -> str | None:
    """The `model_type` of a transformers class, if its module is imported."""
    module, _, name = kind.rpartition(".")
    config = getattr(getattr(sys.modules.get(module), name, None), "config_class", None)
    found = getattr(config, "model_type", None)
    return found if isinstance(found, str) and module.startswith("transformers.") else None
