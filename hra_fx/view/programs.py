"""The subject of a picture out of a graph of aten operators: a `torch.export.ExportedProgram`, or its `.module()`.

Such a graph has no modules left. Names of weights, operators and the record of calls tell what they were. Its rotations
are taken out of a copy, and the layers that they were for are marked.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from hra_fx.export.insert import find_rotate_nodes, remove_rotation
from hra_fx.export.inspect import adapter_layers
from hra_fx.export.match import GraphLayer, find_layers, group_tied, module_classes, parent_path
from hra_fx.export.skeleton import build_skeleton
from hra_fx.layers.target import META, REFLECTION, SiteNote
from hra_fx.reporting import Row
from hra_fx.view.subject import SiteFacts, Subject, known_rotations

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def subject_of_program(program: ExportedProgram, rows: Iterable[Row] = ()) -> Subject:
    """An exported program, transformed or not; its graph is copied.

    Args:
        program: the program.
        rows: those of its report, which tell how far its layers are turned.
    """
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    graph = copy.deepcopy(program.graph)
    originals = program.graph.find_nodes(op="placeholder")
    for node, original in zip(list(graph.find_nodes(op="placeholder")), originals, strict=True):
        if original.name in names:
            _read_by_name(graph, node, names[original.name])
    root: dict[str, Any] = {**program.constants, **program.state_dict}
    root |= dict(program.graph_module.named_children())  # the bodies of control flow
    read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    tensors = {name: value for name, value in root.items() if name in read}
    return _subject(fx.GraphModule(tensors, graph), dict(program.named_parameters()), known_rotations(rows))


def subject_of_captured(module: fx.GraphModule, rows: Iterable[Row] = ()) -> Subject:
    """A `GraphModule` whose operators read parameters by name; its graph is copied.

    Args:
        module: the module, which `hra_fx.export.captured.is_captured`.
        rows: those of its report, which tell how far its layers are turned.
    """
    copied = fx.GraphModule(module, copy.deepcopy(module.graph), type(module).__name__)
    return _subject(copied, dict(module.named_parameters(remove_duplicate=False)), known_rotations(rows))


def _subject(module: fx.GraphModule, tensors: Mapping[str, Tensor], known: Mapping[str, float]) -> Subject:
    own = {name: tensor for name, tensor in tensors.items() if REFLECTION not in name.split(".")}
    nodes = find_rotate_nodes(module.graph)
    adapted = adapter_layers(module) if nodes else []
    for node in nodes:
        remove_rotation(module.graph, node)
    weights: dict[str, list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        if node.target in own:
            weights.setdefault(str(node.target), []).append(node)
    layers = find_layers(weights, own)
    classes = module_classes(module.graph)
    skeleton = build_skeleton(layers, own, classes, with_output=True)
    sites: dict[str, SiteFacts] = {}
    for layer in adapted:
        held = sum(tensor.numel() for key, tensor in own.items() if parent_path(key) == layer.path)
        width, detail = int(layer.chain.shape[0]), layer.description.replace("->", "→")
        rotation = known.get(layer.path, math.nan)
        shown = None if math.isnan(rotation) else rotation
        sites[layer.path] = SiteFacts(detail, width, layer.r, shown, held, vectors=width * layer.r)
        _mark(layer.path, layers)
    return Subject(
        model=skeleton,
        graphs={"": module},
        sites=sites,
        aliases={alias: path for path in sites for alias in (layers[path].aliases if path in layers else ())},
        classes={path: kind.rpartition(".")[2] for path, kind in classes.items()},
        parameters=sum(tensors[names[0]].numel() for names in group_tied(own)),
    )


def _read_by_name(graph: fx.Graph, node: fx.Node, name: str) -> None:
    """Read an attribute in place of a placeholder."""
    with graph.inserting_before(node):
        read = graph.get_attr(name)
    read.meta = dict(node.meta)
    node.replace_all_uses_with(read)
    graph.erase_node(node)


def _mark(path: str, layers: Mapping[str, GraphLayer]) -> None:
    """Leave a note on the operators that read the weight of a site."""
    layer = layers.get(path)
    for consumer in (use.consumer for use in (layer.uses if layer else ())):
        consumer.meta[META] = SiteNote(path, layer.kind, "layer")  # type: ignore[union-attr]
