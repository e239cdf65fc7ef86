"""match: mark the calls of adapted layers and the nodes that read their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.layers.target import META, LayerTarget, NodeTag, weight_name

#: Attributes and methods that do not depend on the values of a weight.
METADATA = frozenset(
    ("dtype", "device", "shape", "ndim", "is_cuda", "requires_grad", "layout", "size", "dim", "numel", "element_size")
)


class MatchPass(PassBase):
    """Marks the nodes that use adapted layers with a `NodeTag`. The graph itself is not changed.

    A call of a layer that reflects its input is a `"layer"`. A read of an adapted weight is a `"weight"`, unless only
    its metadata, such as dtype or shape, is used. The call of a module that contains adapted layers, or of an adapted
    layer with its own forward, is a `"reader"`.

    Nodes are matched by `node.target`, a module path, and never by their generated names.
    """

    def __init__(self, sites: Mapping[str, LayerTarget], prefix: str = "") -> None:
        """Prepare for one graph.

        Args:
            sites: path of a layer in the model -> the adapted layer, for every path of the layer.
            prefix: path in the model of the traced module.
        """
        self._prefix = f"{prefix}." if prefix else ""
        below = {path: site for path, site in sites.items() if path.startswith(self._prefix)}
        self._sites = {path[len(self._prefix) :]: site for path, site in below.items()}
        self._above = {owner for path in self._sites for owner in _owners(path)}

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Mark the nodes. `modified` is True if there is a new mark."""
        modified = False
        for node in graph_module.graph.nodes:
            note = self._note(node)
            if note is None:
                continue
            modified |= node.meta.get(META) != note
            node.meta[META] = note
        return PassResult(graph_module, modified)

    def _note(self, node: fx.Node) -> NodeTag | None:
        target = str(node.target)
        if node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            site = self._sites.get(owner)
            found = site is not None and name == weight_name(site.kind) and not all(map(_is_metadata, node.users))
            return NodeTag(site.path, site.kind, "weight") if site is not None and found else None
        if node.op != "call_module":
            return None
        site = self._sites.get(target)
        if site is not None and site.reflects_input:
            return NodeTag(site.path, site.kind, "layer")
        if site is None and target not in self._above:
            return None
        inside = [s for path, s in self._sites.items() if path == target or path.startswith(f"{target}.")]
        first, *others = dict.fromkeys(inside)
        return NodeTag(first.path, first.kind, "reader", tuple(other.path for other in others))


def _is_metadata(node: fx.Node) -> bool:
    return (node.target is getattr and node.args[1] in METADATA) or (
        node.op == "call_method" and node.target in METADATA
    )


def _owners(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path
