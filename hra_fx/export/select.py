"""Select the layers of a captured graph by a configuration, and create the initial vectors of their adapters.

A captured graph does not have layers, so they are selected on a skeleton: a model with a module for each path in the
names of the graph, and a layer of the right kind for each weight. So a configuration selects the same layers, with the
same errors, as in the original model.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import is_higher_order, schema_of
from hra_fx.config import HRAConfig
from hra_fx.errors import ConfigError, SelectionError, UnsupportedLayerError
from hra_fx.export.match import WEIGHTS, GraphLayer, find_layers, find_weight_uses, module_classes
from hra_fx.functional import householder
from hra_fx.functional.rotate import as_rows
from hra_fx.layers.target import LayerKind, weight_name
from hra_fx.selection.check import select_checked
from hra_fx.selection.origin import Origin, keep_origin
from hra_fx.selection.select import is_target


def select_layers(
    graph: fx.Graph, weights: Mapping[str, list[fx.Node]], tensors: Mapping[str, Tensor], config: HRAConfig
) -> list[GraphLayer]:
    """Return the layers that a configuration selects, and check that all of them support reflections."""
    if config.bias != "none" or config.modules_to_save:
        field, value = ("bias", config.bias) if config.bias != "none" else ("modules_to_save", config.modules_to_save)
        raise ConfigError(
            f"{field}={value!r} trains parameters of the base model, but only reflections can be trained in a captured "
            f"graph. Remove {field}, or transform the model before capturing it."
        )
    layers = find_layers(weights, tensors)
    _check_targets(layers, weights, tensors, config)
    skeleton = build_skeleton(layers, tensors, module_classes(graph))
    chosen = [layers[path] for path in select_checked(skeleton, config)]
    for layer in chosen:
        if layer.refusal:
            raise UnsupportedLayerError(f"{layer.path}: {layer.refusal}.")
    return chosen


def _check_targets(
    layers: Mapping[str, GraphLayer],
    weights: Mapping[str, list[fx.Node]],
    tensors: Mapping[str, Tensor],
    config: HRAConfig,
) -> None:
    """Raise an error for targets with an unsupported use in the graph, with more detail than the selection's error."""
    if not layers:
        raise SelectionError(
            "target_modules: the graph has no linear layer or convolution with a parameter named '<layer>.weight'. Its "
            f"parameters are {', '.join(list(weights)[:8]) or '(none)'}. Capture the model with torch.export.export, "
            "which keeps the names."
        )
    all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    problems = {path: layer.refusal for path, layer in layers.items() if layer.refusal and not all_linear}
    known = {*layers, *(path for layer in layers.values() for path in layer.aliases)}
    for name, nodes in weights.items():
        path, _, last = name.rpartition(".")
        if last in WEIGHTS and tensors[name].dim() > 1 and path not in known:
            consumers = [use.consumer for node in nodes for use in find_weight_uses(node, tensors[name].dim())]
            nested = any(is_higher_order(consumer.target) for consumer in consumers)
            if nested or not all_linear:
                problems[path] = _why_not(consumers)
    for path, problem in problems.items():
        if is_target(config, path, ".*" if all_linear else None):
            raise UnsupportedLayerError(f"{path}: {problem}.")


def _why_not(consumers: list[fx.Node]) -> str:
    """Return why a weight with these consumers does not belong to a supported layer."""
    use = "is not used"
    if consumers:
        target = consumers[0].target
        use = f"is used by {target} (node {consumers[0].name!r})"
        if is_higher_order(target):
            use = f"is used in a block that torch.export captures as a separate graph ({target})"
    return (
        f"in this graph its weight {use}; expected an operator of a linear layer or a convolution. Exclude it with "
        "exclude_modules, or transform the model before capturing it (without trace=True)"
    )


def init_adapter(layer: GraphLayer, weight: Tensor, config: HRAConfig) -> tuple[nn.Parameter, Tensor | None]:
    """Initial vectors `U: (d, r)` and anchor, at least float32. With a seed, they equal those of the model."""
    if weight.is_meta:
        raise UnsupportedLayerError(
            f"{layer.path}: its weight is on the meta device, so the vectors in the graph would have no data. Load the "
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


#: The output layers of transformers' models (get_output_embeddings).
OUTPUTS = ("lm_head", "lm_head.decoder", "cls.predictions.decoder", "embed_out", "proj_out", "output_projection")
CONVOLUTIONS: dict[LayerKind, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
}


def build_skeleton(
    layers: Mapping[str, GraphLayer], tensors: Mapping[str, Tensor], classes: Mapping[str, str]
) -> nn.Module:
    """The skeleton of a graph: a model that shares the weights of the graph and cannot be run."""
    origin = origin_of_graph(classes, [path for path, layer in layers.items() if layer.is_candidate])
    root = fx.GraphModule(nn.Module(), fx.Graph(), origin.class_name)
    keep_origin(root, origin)
    first = {alias: path for path, layer in layers.items() for alias in layer.aliases}
    modules: dict[str, nn.Module] = {"": root}
    for path in module_paths([*tensors, *(f"{path}." for path in classes)]):
        layer = layers.get(path)
        made: nn.Module
        if path in first:
            made = modules[first[path]]
        elif layer is None or not layer.is_candidate:
            made = type(classes.get(path, "Module").rpartition(".")[2], (nn.Module,), {})()
        else:
            made = layer_of(layer, tensors[layer.name].detach())
        parent, _, child = path.rpartition(".")
        modules[path] = modules[parent]._modules[child] = made  # any name is allowed here, also "graph"
    return root


def module_paths(names: Iterable[str]) -> list[str]:
    """The paths of all modules in the names except the root, parents first."""
    paths: dict[str, None] = {}
    for name in names:
        parts = name.split(".")[:-1]
        paths |= dict.fromkeys(".".join(parts[: length + 1]) for length in range(len(parts)))
    return [path for path in paths if path]


def origin_of_graph(classes: Mapping[str, str], paths: Collection[str]) -> Origin:
    """The origin of a program's model, from the classes of its modules and the paths of its layers."""
    class_name = classes.get("", "torch.nn.modules.module.Module")
    library, _, name = class_name.rpartition(".")
    is_pretrained = library.startswith("transformers.")
    output = next((path for path in OUTPUTS if path in paths), None) if is_pretrained else None
    # The class has a configuration with a `model_type` if its module is imported.
    config = getattr(getattr(sys.modules.get(library), name, None), "config_class", None) if is_pretrained else None
    model_type = getattr(config, "model_type", None)
    return Origin(name, library, is_pretrained, config=model_type and {"model_type": model_type}, output=output)


def layer_of(layer: GraphLayer, weight: Tensor) -> nn.Module:
    """A layer of the right kind and shape with this weight; its other settings are arbitrary."""
    weight = weight.mT if layer.transposed else weight
    groups = (arguments_of(use.consumer)["groups"] for use in layer.uses if use.kind in CONVOLUTIONS)
    options: dict[str, Any] = {"groups": next(groups)} if layer.kind in CONVOLUTIONS else {}
    made = make_layer(layer.kind, weight, bias=False, **options)
    made._parameters[weight_name(layer.kind)] = nn.Parameter(weight, requires_grad=False)
    return made


def make_layer(kind: LayerKind, weight: Tensor, **options: Any) -> nn.Module:
    """Create a layer on the meta device for a weight `(out, d)`, or for the weight of a convolution."""
    out, width = weight.shape[:2]
    if kind in CONVOLUTIONS:
        size, channels = tuple(weight.shape[2:]), width * options.get("groups", 1)
        return CONVOLUTIONS[kind](channels, out, size, device="meta", **options)  # type: ignore[arg-type]
    if kind == "attention":
        return nn.MultiheadAttention(width, 1, device="meta", **options)
    return nn.Linear(width, out, device="meta", **options)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, including its defaults."""
    schema = schema_of(node.target)
    arguments = () if schema is None else schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    names = [argument.name for argument in arguments]
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
