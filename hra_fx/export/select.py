"""Which sites of a captured graph a configuration means, and how their vectors start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hra_fx.compat import is_higher_order
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError, ConfigError, SelectionError, UnsupportedLayerError
from hra_fx.export.match import WEIGHTS, GraphSite, find_sites, module_classes
from hra_fx.export.ops import ROTATE
from hra_fx.export.skeleton import outline_of
from hra_fx.export.weight_uses import reads_of
from hra_fx.functional import householder
from hra_fx.layers.target import as_rows
from hra_fx.selection.check import check
from hra_fx.selection.select import is_target, select

# Key of the note in graph_module.meta["custom"], which is the only entry that torch.export.save keeps.
_NOTE = "hra_fx"


@dataclass(frozen=True)
class Start:
    """A fresh adapter at one site.

    Attributes:
        vectors: `U: (d, r)`.
        anchor: `A: (d, k)`, if it has one.
        trainable: whether the vectors are to have a gradient.
    """

    vectors: Tensor
    anchor: Tensor | None
    trainable: bool


def choose(
    graph: fx.Graph, weights: Mapping[str, list[fx.Node]], tensors: Mapping[str, Tensor], config: HRAConfig
) -> list[GraphSite]:
    """The sites that a configuration selects, all of them fit for reflections.

    Args:
        graph: the captured graph.
        weights: qualified name of a parameter -> its nodes.
        tensors: qualified name -> parameter.
        config: the configuration.

    Raises:
        ConfigError: the configuration trains more than reflections.
        SelectionError: it does not fit the graph.
        UnsupportedLayerError: a selected layer cannot be adapted rightly.
    """
    if config.bias != "none" or config.modules_to_save:
        field, value = ("bias", config.bias) if config.bias != "none" else ("modules_to_save", config.modules_to_save)
        raise ConfigError(
            f"{field}: {value!r} trains parameters of the model itself, and in a captured graph only reflections are "
            f"trained. Leave {field} out, or transform the model before its capture."
        )
    sites = find_sites(weights, tensors)
    linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    _refuse_unreadable(sites, weights, tensors, config, all_linear=linear)
    outline = outline_of(sites, tensors, module_classes(graph), with_output=not linear)
    selected = select(outline, config)
    check(outline, selected, config)
    chosen = [sites[path] for path in selected]
    for site in chosen:
        if site.refusal:
            raise UnsupportedLayerError(f"{site.path}: {site.refusal}.")
    return chosen


def _refuse_unreadable(
    sites: Mapping[str, GraphSite],
    weights: Mapping[str, list[fx.Node]],
    tensors: Mapping[str, Tensor],
    config: HRAConfig,
    *,
    all_linear: bool,
) -> None:
    """Name the layers that a configuration means and the graph hides, which the selection would call another kind."""
    known = {*sites, *(path for site in sites.values() for path in site.aliases)}
    for name, nodes in weights.items():
        path, _, last = name.rpartition(".")
        if last not in WEIGHTS or tensors[name].dim() < 2 or path in known:
            continue
        readers = [read.reader for node in nodes for read in reads_of(node, tensors[name].dim())]
        inside = any(is_higher_order(reader.target) for reader in readers)
        if (inside or not all_linear) and is_target(config, path, ".*" if all_linear else None):
            found = f"{readers[0].target} (node {readers[0].name!r})" if readers else "nothing"
            raise UnsupportedLayerError(
                f"{path}: in this graph its weight is read by {found}, and not by an operator of a linear layer or a "
                "convolution. Leave it out with exclude_modules, or transform the model before its capture."
            )
    if not sites:
        raise SelectionError(
            "target_modules: no operator of the graph reads a parameter called '<layer>.weight' as a linear layer or a "
            f"convolution does; its parameters are called {', '.join(list(weights)[:8]) or 'nothing at all'}. Capture "
            "the model with torch.export.export, which keeps their names."
        )
    for path, site in sites.items():
        if not all_linear and site.refusal and is_target(config, path):
            raise UnsupportedLayerError(f"{path}: {site.refusal}.")


def start(site: GraphSite, weight: Tensor, config: HRAConfig) -> Start:
    """Fresh vectors for a site, in float32 at least: those that the layer itself would get."""
    with torch.inference_mode(False):
        width = as_rows(weight, columns=site.columns).shape[1]
        dtype = householder.working_dtype(weight.dtype)
        vectors = householder.start(
            width, config.r, apply_GS=config.apply_GS, init_weights=config.init_weights, dtype=dtype
        )
        anchor = householder.anchor(vectors, apply_GS=config.apply_GS) if config.init_weights else None
        # Contiguous, for torch.export.save warns of others.
        anchor = None if anchor is None else anchor.contiguous().to(weight.device)
        return Start(vectors.to(weight.device), anchor, trainable=not config.inference_mode)


def is_done(graph_module: fx.GraphModule, config: HRAConfig, adapter_name: str) -> bool:
    """Whether a graph has this adapter already.

    Raises:
        AdapterError: it has another.
    """
    note = note_of(graph_module)
    if note is None and not graph_module.graph.find_nodes(op="call_function", target=ROTATE):
        return False
    if note is not None and note["adapter"] == adapter_name and note["config"] == config.to_dict():
        return True
    present = "reflections" if note is None else f"the adapter {note['adapter']!r}"
    same = note is not None and note["adapter"] == adapter_name
    raise AdapterError(
        f"adapter {adapter_name!r}: the graph carries {present} already{', with another configuration' * same}, and a "
        "captured graph holds one. Fold it first (hra_fx.fold), or transform the graph as it was captured."
    )


def note_of(graph_module: fx.GraphModule) -> Any:
    """What was written down of the adapter of a graph: `adapter`, `config`, `trainable`; `None` if it has none."""
    return graph_module.meta.get("custom", {}).get(_NOTE)


def with_note(
    graph_module: fx.GraphModule, config: HRAConfig, adapter_name: str, trainable: list[str]
) -> dict[str, Any]:
    """The `meta` of a graph with a note of its adapter, as values that JSON can hold.

    Args:
        graph_module: the graph, which is not changed.
        config: the configuration of the adapter.
        adapter_name: its name.
        trainable: names of the parameters that had gradients before.
    """
    note = {"adapter": adapter_name, "config": config.to_dict(), "trainable": trainable}
    return {**graph_module.meta, "custom": {**graph_module.meta.get("custom", {}), _NOTE: note}}


def without_note(graph_module: fx.GraphModule) -> dict[str, Any]:
    """The `meta` of a graph as it was before `with_note`."""
    custom = {key: value for key, value in graph_module.meta.get("custom", {}).items() if key != _NOTE}
    rest = {key: value for key, value in graph_module.meta.items() if key != "custom"}
    return {**rest, "custom": custom} if custom else rest
