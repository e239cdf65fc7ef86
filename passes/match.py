"""match: which calls of a graph are sites."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.site import META, SiteKind, SiteNote


class MatchPass(PassBase):
    """Marks every call of a site's layer with a `SiteNote`; the graph itself stays as it is.

    Calls are matched on `node.target`, the module path, never on the generated names of nodes.

    Attributes:
        calls: path of a site in the model -> how often the graph calls it.
    """

    def __init__(self, sites: Mapping[str, SiteKind], prefix: str = "") -> None:
        """Prepare for one graph.

        Args:
            sites: path of a site in the model -> its kind.
            prefix: path in the model of the module that the graph is the forward of.
        """
        self._sites = sites
        self._prefix = f"{prefix}." if prefix else ""
        self.calls: dict[str, int] = {}

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Mark the calls; `modified` says whether a mark is new."""
        modified = False
        self.calls = {}
        for node in graph_module.graph.find_nodes(op="call_module"):
            path = f"{self._prefix}{node.target}"
            if path not in self._sites:
                continue
            self.calls[path] = self.calls.get(path, 0) + 1
            note = SiteNote(path, self._sites[path], "layer")
            modified |= node.meta.get(META) != note
            node.meta[META] = note
        return PassResult(graph_module, modified)
