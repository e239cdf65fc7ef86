"""The graph of a ResNet block before and after `insert`, node by node.

`hra_fx.visualize` would draw a reflection and its layer as one box.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import networkx as nx
import torch
import torchvision
from torch import fx

import hra_fx
from hra_fx.tracing.graphs import trace_model
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import Heatmap
from hra_fx.view.opening import Block, opened
from hra_fx.view.subject import describe_module
from hra_fx.view.svg_file import svg_file
from hra_fx.view.theme import THEMES
from hra_fx.view.tree import Leaf, LeafKind, Scope

BLOCK, RANK = "layer1.0", 8


def drawing_of_nodes(graph: fx.GraphModule, block: str) -> Drawing:
    """The nodes of one block, with a box for each value that enters or leaves it."""
    nodes = list(graph.graph.nodes)
    inside = [place for place, node in enumerate(nodes) if str(node.target).startswith(f"{block}.")]
    part = nodes[inside[0] : inside[-1] + 1]
    picture: nx.DiGraph[str] = nx.DiGraph(traced=frozenset({""}), classes={}, details={})
    for node in part:
        for source in node.all_input_nodes:
            if source not in part:
                picture.add_node(source.name, leaf=_port(f"from {source.target}", "input"))
        picture.add_node(node.name, leaf=_leaf(graph, node, block))
        picture.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    picture.add_node("out", leaf=_port("to the next block", "output"))
    picture.add_edge(part[-1].name, "out")
    return Drawing(block, "", "", picture, ())


def _port(name: str, kind: LeafKind) -> Leaf:
    return Leaf(name, "", kind, "placeholder", name, ())


def _leaf(graph: fx.GraphModule, node: fx.Node, block: str) -> Leaf:
    if node.op != "call_module":
        name = node.name.rpartition("_")[0] or node.name
        return Leaf(name, "", "op", node.op, name, ())
    path = str(node.target)
    module, name = graph.get_submodule(path), path.removeprefix(f"{block}.")
    if not name.endswith(".hra_u"):
        return Leaf(name, describe_module(module), "module", node.op, path, ())
    sizes = {"width": module.width, "rank": RANK}
    return Leaf(name, "reflections", "adapted_layer", node.op, path, (), marks=(path,), **sizes)


def write_insert(folder: Path) -> None:
    """Write `insert-light.svg` and `insert-dark.svg`."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    before = drawing_of_nodes(trace_model(model, ()), BLOCK)
    config = hra_fx.HRAConfig(r=RANK, target_modules=r"layer\d\.\d\.conv\d")
    after = drawing_of_nodes(hra_fx.transform(model, config, trace=True), BLOCK)
    named = ((before, "Captured graph"), (after, "After insert"))
    blocks = [opened(replace(drawing.tree(), name=name), 0) for drawing, name in named]
    root = Scope("", "", "", eager=False, items=tuple(block.item for block in blocks))
    whole = Drawing("", f"{BLOCK} of ResNet-18", "torch.fx graph before and after the insert pass", after.picture, ())
    for theme in THEMES:
        text = svg_file(Block(root, tuple(blocks)), whole, Heatmap(), theme)
        (folder / f"insert-{theme}.svg").write_text(text, encoding="utf-8")
