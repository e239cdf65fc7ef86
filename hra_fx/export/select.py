"""Which layers of a captured graph a configuration selects, and the initial vectors of their adapters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import is_higher_order
from hra_fx.config import HRAConfig
from hra_fx.errors import ConfigError, SelectionError, UnsupportedLayerError
from hra_fx.export.match import WEIGHTS, GraphLayer, find_layers, module_classes
from hra_fx.export.skeleton import build_skeleton
from hra_fx.export.weight_uses import find_weight_uses
from hra_fx.functional import householder
from hra_fx.functional.rotate import as_rows
from hra_fx.selection.check import select_checked
from hra_fx.selection.select import is_target


def select_layers(
    graph: fx.Graph, weights: Mapping[str, list[fx.Node]], tensors: Mapping[str, Tensor], config: HRAConfig
) -> list[GraphLayer]:
    """The layers that a configuration selects, all of which support reflections.

    Args:
        graph: the captured graph.
        weights: qualified name of a parameter -> its nodes.
        tensors: qualified name -> parameter.
        config: the configuration.

    Raises:
        ConfigError: the configuration trains more than reflections.
        SelectionError: it does not fit the graph.
        UnsupportedLayerError: a selected layer does not support reflections.
    """
    if config.bias != "none" or config.modules_to_save:
        field, value = ("bias", config.bias) if config.bias != "none" else ("modules_to_save", config.modules_to_save)
        raise ConfigError(
            f"{field}={value!r} trains parameters of the base model, but only reflections can be trained in a captured "
            f"graph. Remove {field}, or transform the model before capturing it."
        )
    layers = find_layers(weights, tensors)
    all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    _check_targets(layers, weights, tensors, config, all_linear=all_linear)
    skeleton = build_skeleton(layers, tensors, module_classes(graph), with_output=not all_linear)
    selected = select_checked(skeleton, config)
    chosen = [layers[path] for path in selected]
    for layer in chosen:
        if layer.refusal:
            raise UnsupportedLayerError(f"{layer.path}: {layer.refusal}.")
    return chosen


def _check_targets(
    layers: Mapping[str, GraphLayer],
    weights: Mapping[str, list[fx.Node]],
    tensors: Mapping[str, Tensor],
    config: HRAConfig,
    *,
    all_linear: bool,
) -> None:
    """Raise for targets whose use in the graph is unsupported, with a better error than the selection would give."""
    known = {*layers, *(path for layer in layers.values() for path in layer.aliases)}
    for name, nodes in weights.items():
        path, _, last = name.rpartition(".")
        if last not in WEIGHTS or tensors[name].dim() < 2 or path in known:
            continue
        consumers = [use.consumer for node in nodes for use in find_weight_uses(node, tensors[name].dim())]
        nested = any(is_higher_order(consumer.target) for consumer in consumers)
        if (nested or not all_linear) and is_target(config, path, ".*" if all_linear else None):
            raise UnsupportedLayerError(
                f"{path}: {_why_not(consumers)}. Exclude it with exclude_modules, or transform the model before "
                "capturing it (without trace=True)."
            )
    if not layers:
        raise SelectionError(
            "target_modules: the graph has no linear layer or convolution with a parameter named '<layer>.weight'. Its "
            f"parameters are {', '.join(list(weights)[:8]) or '(none)'}. Capture the model with torch.export.export, "
            "which keeps the names."
        )
    for path, layer in layers.items():
        if not all_linear and layer.refusal and is_target(config, path):
            raise UnsupportedLayerError(f"{path}: {layer.refusal}.")


#: Operators of `torch.export` with a nested graph -> the context that it records by them.
_CONTEXTS = {
    "wrap_with_autocast": "torch.autocast",
    "wrap_with_set_grad_enabled": "torch.no_grad() or another grad mode",
}


def context_of(target: object) -> str | None:
    """The context that an operator of `torch.export` runs its graph under; `None` for other operators.

    Example:
        >>> context_of(torch.ops.higher_order.wrap_with_autocast)
        'torch.autocast'
        >>> context_of(torch.ops.aten.linear.default)
    """
    return _CONTEXTS.get(str(target)) if is_higher_order(target) else None


def _why_not(consumers: list[fx.Node]) -> str:
    """Why a weight with these consumers is not that of a layer."""
    expected = "expected an operator of a linear layer or a convolution"
    if not consumers:
        return f"in this graph its weight is not used; {expected}"
    target = consumers[0].target
    if context := context_of(target):
        return f"the layer runs under {context}, which torch.export captures as a separate graph"
    return f"in this graph its weight is used by {target} (node {consumers[0].name!r}); {expected}"


def init_adapter(layer: GraphLayer, weight: Tensor, config: HRAConfig) -> tuple[nn.Parameter, Tensor | None]:
    """Initial vectors `U: (d, r)` and anchor of a layer, at least float32; as for the layer of the model and a seed.

    Raises:
        UnsupportedLayerError: the weight is on the meta device.
    """
    if weight.is_meta:
        raise UnsupportedLayerError(
            f"{layer.path}: its weight is on the meta device, and the graph would keep vectors without data. Load the "
            "weights before capturing the model."
        )
    with torch.inference_mode(False):
        vectors, anchor = householder.init_vectors(
            as_rows(weight, transposed=layer.transposed).shape[1],
            config.rank_of(layer.path),
            apply_GS=config.apply_GS,
            init_weights=config.init_weights,
            dtype=householder.working_dtype(weight.dtype),
        )
        anchor = None if anchor is None else anchor.to(weight.device)
        return nn.Parameter(vectors.to(weight.device), requires_grad=not config.inference_mode), anchor
