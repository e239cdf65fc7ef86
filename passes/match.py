"""match: which calls, and which reads of a weight, of a graph are those of sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.layers.target import META, Site, SiteNote, weight_name


class MatchPass(PassBase):
    """Marks what a graph does with every site with a `SiteNote`; the graph itself stays as it is.

    A call of a layer whose input is reflected is a `"layer"`. Where the weight is reflected, each read of it is a
    `"weight"`, and the call of a module that has such reads inside it, or sites of any sort, is a `"reader"`.

    Nodes are matched on `node.target`, a path of modules, never on the generated names of nodes.

    Attributes:
        calls: path of a site in the model -> in how many nodes it acts.
    """

    def __init__(self, sites: Mapping[str, Site], prefix: str = "") -> None:
        """Prepare for one graph.

        Args:
            sites: each path of a layer in the model -> the site.
            prefix: path in the model of the module that the graph is the forward of.
        """
        self._prefix = f"{prefix}." if prefix else ""
        below = {path: site for path, site in sites.items() if path.startswith(self._prefix)}
        self._sites = {path[len(self._prefix) :]: site for path, site in below.items()}
        self._above = {owner for path in self._sites for owner in _owners(path)}
        self.calls: dict[str, int] = {}

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Mark the nodes; `modified` says whether a mark is new."""
        modified = False
        self.calls = {}
        for node in graph_module.graph.nodes:
            note = self._note(node)
            if note is None:
                continue
            for path in (note.path, *note.also):
                self.calls[path] = self.calls.get(path, 0) + 1
            modified |= node.meta.get(META) != note
            node.meta[META] = note
        return PassResult(graph_module, modified)

    def _note(self, node: fx.Node) -> SiteNote | None:
        target = str(node.target)
        if node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            site = self._sites.get(owner)
            found = site is not None and site.on_weight and name == weight_name(site.kind)
            return SiteNote(site.path, site.kind, "weight") if site is not None and found else None
        if node.op != "call_module":
            return None
        site = self._sites.get(target)
        if site is not None and not site.on_weight:
            return SiteNote(site.path, site.kind, "layer")
        if site is None and target not in self._above:
            return None
        inside = [s for path, s in self._sites.items() if path == target or path.startswith(f"{target}.")]
        if not inside:
            return None
        first, *others = dict.fromkeys(inside)
        return SiteNote(first.path, first.kind, "reader", tuple(other.path for other in others))


def _owners(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path
