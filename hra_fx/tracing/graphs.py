"""`graphs`: the rewritten regions, or whole graphs of one call, for pictures, exporters and further passes."""

from __future__ import annotations

import keyword
from typing import Any

from torch import fx, nn

from hra_fx.layers.adapted_layer import SiteCarrier
from hra_fx.layers.target import META, SiteNote, find_kind
from hra_fx.model.example_inputs import as_call
from hra_fx.model.state import regions_of, require_sites, sites_of
from hra_fx.tracing.region import Region
from hra_fx.tracing.search import find_regions
from hra_fx.tracing.share_modules import over
from hra_fx.tracing.whole import whole_graphs
from passes.insert import InsertPass


def graphs(model: nn.Module, example_inputs: Any = None) -> dict[str, fx.GraphModule]:
    """The graphs of a transformed model, for the mode (train or eval) that it is in.

    Without example inputs these are the rewritten regions. With them they are whole graphs: that of a model which fx
    captured whole, else what TorchDynamo makes of one call, with each reflection as one node (a function of
    `hra_fx.layers.variants`) that has a `SiteNote` in `meta["hra"]`.

    A whole graph of TorchDynamo takes the tensors of `example_inputs` in the order in which they stand there, and gives
    a tuple of those that the model returns; it holds for inputs of these shapes, and for the grad mode and autocast of
    the moment. The call is only traced, and never run. Where it has graph breaks, it is run once, on a copy that shares
    the parameters; its pieces then take and give what TorchDynamo hands from one to the next.

    Args:
        model: a transformed model.
        example_inputs: a tuple of positional arguments, a dictionary of keyword arguments, or one tensor.

    Returns:
        Without example inputs: module path -> GraphModule over the model's own modules and parameters; the key is `""`
        for a model that was captured whole, and the layer's path for a layer that is a region by itself. With them:
        `""` -> the whole graph, or `"call[0]"`, `"call[1]"`, ... -> its pieces in the order in which they run; the
        `get_attr` nodes of TorchDynamo's have the names of the model's parameters and buffers, which they share. The
        graphs are copies: changing one does not change what the model runs.

    Raises:
        AdapterError: the model has no reflections, or does not run on the inputs; or TorchDynamo cannot record the
            call.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
        >>> [node.target for node in graphs(model)[""].graph.nodes if node.op == "call_module"]
        ['0.hra_u', '0', '1']
    """
    found = _regions(model)
    if example_inputs is None:
        return found
    call = as_call(example_inputs)
    return found if list(found) == [""] else whole_graphs(model, call)


def _regions(model: nn.Module) -> dict[str, fx.GraphModule]:
    sites = require_sites(model)
    found: dict[str, fx.GraphModule] = {}
    covered: set[str] = set()
    for path, module in regions_of(model).items():
        region: Region = module._hra_region
        if not region.sites <= sites_of(module).keys():  # a part was folded since, and the Python forward runs
            continue
        found[path] = region.graph_module(module, module.training)
        covered |= {f"{path}.{site}".lstrip(".") for site in region.sites}
    for path, layer in sites.items():
        if path not in covered:
            found[path] = _alone(path, layer)
    return dict(sorted(found.items()))


def _alone(path: str, layer: SiteCarrier) -> fx.GraphModule:
    """A graph of the one call, or of the weight that others read; its root holds the layer under its own name."""
    name = path.rpartition(".")[2]
    name = "layer" if keyword.iskeyword(name) else name
    root = nn.Module()
    root.add_module(name, layer)
    graph = fx.Graph()
    if layer.hra_u.on_weight:
        marked = graph.get_attr(f"{name}.{layer.hra_u.weight_name}")
    else:
        marked = graph.call_module(name, (graph.placeholder("input"),))
    graph.output(marked)
    marked.meta[META] = SiteNote(path, layer.hra_u.kind, "weight" if layer.hra_u.on_weight else "layer")
    module = over(root, graph, type(layer).__name__)
    InsertPass()(module)
    module.training = layer.training
    return module


def plain_graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    """The largest parts of a plain model that fx can trace: module path -> graph."""
    layers = {path: part for path, part in model.named_modules() if find_kind(part) is not None}
    found = find_regions(model, layers).regions
    return {path: region.graph_module(model.get_submodule(path), model.training) for path, region in found.items()}
