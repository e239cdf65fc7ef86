"""The modules of a captured graph, as far as names and weights tell: what the selection of layers is made on.

A graph has no modules left. The outline has one for every path, with the real weights in layers of the kind that reads
them, so that a configuration means the same layers of it, and refuses in the same words, as of the model before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hra_fx.export.match import GraphSite
from hra_fx.layers.target import SiteKind, weight_name

# Where transformers' models have their output layer, by their get_output_embeddings.
_OUTPUTS = ("lm_head", "lm_head.decoder", "cls.predictions.decoder", "embed_out", "proj_out", "output_projection")
_CONVOLUTIONS: dict[SiteKind, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
}


def outline_of(
    sites: Mapping[str, GraphSite], tensors: Mapping[str, Tensor], classes: Mapping[str, str], *, with_output: bool
) -> nn.Module:
    """The outline of a graph, as a model that shares its weights and must not be run.

    Args:
        sites: layer path -> site.
        tensors: qualified name -> parameter, all that the graph has.
        classes: module path -> qualified class name, as far as the graph tells.
        with_output: whether the output layer of a transformers model counts as a layer.
    """
    root_class = classes.get("", "Module")
    modules: dict[str, nn.Module] = {}
    first = {alias: path for path, site in sites.items() for alias in site.aliases}
    for path in _paths([*tensors, *(f"{path}." for path in classes)]):
        site = sites.get(path)
        is_output = path in _OUTPUTS and root_class.startswith("transformers.")
        # What only holds the weight of a linear operator, and is none, an embedding say, is not chosen as a layer.
        if path in first:
            modules[path] = modules[first[path]]
        elif site is None or not (site.own or site.refusal is None) or (is_output and not with_output):
            modules[path] = _placeholder(classes.get(path, "Module"))
        else:
            modules[path] = _layer(site, tensors[site.name].detach())
        if path:
            parent, _, child = path.rpartition(".")
            modules[parent]._modules[child] = modules[path]
    if model_type := _model_type(root_class):
        modules[""].config = {"model_type": model_type}  # type: ignore[assignment]
    return modules[""]


def _paths(names: Iterable[str]) -> list[str]:
    """The path of every module that names lead through, each after its parent."""
    paths: dict[str, None] = {"": None}
    for name in names:
        parts = name.split(".")[:-1]
        paths |= dict.fromkeys(".".join(parts[: length + 1]) for length in range(len(parts)))
    return list(paths)


def _placeholder(kind: str) -> nn.Module:
    """A module of which only the name of the class is known."""
    made: nn.Module = type(kind.rpartition(".")[2], (nn.Module,), {})()
    return made


def _layer(site: GraphSite, weight: Tensor) -> nn.Module:
    """A layer of a site's kind around its weight; its other settings are made up."""
    weight = weight.mT if site.columns else weight
    shape: Any = weight.shape
    layer: nn.Module
    if site.kind in _CONVOLUTIONS:
        layer = _CONVOLUTIONS[site.kind](shape[1], shape[0], tuple(shape[2:]), bias=False, device="meta")
    elif site.kind == "attention":
        layer = nn.MultiheadAttention(shape[1], 1, bias=False, device="meta")
    else:
        layer = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    layer._parameters[weight_name(site.kind)] = nn.Parameter(weight, requires_grad=False)
    return layer


def _model_type(kind: str) -> str | None:
    """The model type of a transformers class, if that is loaded."""
    module, _, name = kind.rpartition(".")
    config = getattr(getattr(sys.modules.get(module), name, None), "config_class", None)
    found = getattr(config, "model_type", None)
    return found if isinstance(found, str) and module.startswith("transformers.") else None
