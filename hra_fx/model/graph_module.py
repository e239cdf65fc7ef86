"""A `fx.GraphModule` of the user's own, whose graph calls layers: the reflections go into that graph, in place.

No class is swapped on the module itself, for each has a class of its own, which fx makes anew when it copies one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack

from torch import fx, nn

from hra_fx.errors import UnsupportedLayerError
from hra_fx.layers.target import META, REFLECTION, Site, SiteNote
from hra_fx.model.state import sites_of
from hra_fx.tracing.weight_reads import functional_reads
from passes.fold import FoldPass
from passes.insert import InsertPass
from passes.match import MatchPass
from passes.verify import VerifyPass


def rewrite(module: fx.GraphModule, sites: Mapping[str, Site], undo: ExitStack) -> None:
    """Give every call of a site in the graph its reflection, and take away those that have no site any more.

    Raises:
        UnsupportedLayerError: the graph reads the weight of a site.
    """
    before, graph = module.graph, copy.deepcopy(module.graph)
    undo.callback(setattr, module, "graph", before)
    module.graph = graph
    restore(module)
    for path, reader in functional_reads(graph, {path: module.get_submodule(path) for path in sites}).items():
        raise UnsupportedLayerError(
            f"{sites[path].path}: the graph reads its weight for node {reader.name!r}, and a copy of the graph would "
            "hold the weight without the layer, and so without reflections. Transform the model before it is traced, "
            "give a torch.export.ExportedProgram of it, or leave the layer out with exclude_modules."
        )
    for step in (MatchPass(sites), InsertPass(), VerifyPass()):
        step(module)


def restore(module: nn.Module) -> None:
    """Take all reflections out of the graph of a `GraphModule`; of another module nothing."""
    if isinstance(module, fx.GraphModule):
        _mark_again(module)
        FoldPass()(module)


def shown_in(module: nn.Module) -> frozenset[str]:
    """The paths of the sites that the graph of a `GraphModule` shows; none for another module."""
    if not isinstance(module, fx.GraphModule):
        return frozenset()
    _mark_again(module)
    notes = [node.meta.get(META) for node in module.graph.nodes]
    return frozenset(path for note in notes if isinstance(note, SiteNote) for path in (note.path, *note.also))


def _mark_again(module: fx.GraphModule) -> None:
    """Put the marks back that a pickle has lost: fx keeps the code of a graph, and not what its nodes carry."""
    sites = sites_of(module)
    for node in module.graph.find_nodes(op="call_module"):
        layer = str(node.target).removesuffix(f".{REFLECTION}")
        if layer == node.target or META in node.meta:
            continue
        called = module.get_submodule(layer)
        for path, site in sites.items():
            if site is called:
                node.meta[META] = SiteNote(path, site.hra_u.kind, "reflection")
                for user in node.users:
                    user.meta[META] = SiteNote(path, site.hra_u.kind, "layer")
