"""The subject of a picture from a graph of ATen operators: a program, or its module.

Such a graph has no modules. They are recovered from the names of weights, the operators and `nn_module_stack`.
Rotations are removed from a copy of the graph, and the nodes of their layers are tagged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from hra_fx.export.inspect import LayerAdapter, adapter_layers
from hra_fx.export.match import GraphLayer, find_layers, group_tied, module_classes
from hra_fx.export.ops import find_rotate_nodes, remove_rotation
from hra_fx.export.select import build_skeleton
from hra_fx.layers.target import META, REFLECTION, NodeTag
from hra_fx.view.subject import LayerFacts, Subject

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def subject_of_program(program: ExportedProgram) -> Subject:
    """An exported program, transformed or not; its graph is copied."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    graph = copy.deepcopy(program.graph)
    originals = program.graph.find_nodes(op="placeholder")
    for node, original in zip(list(graph.find_nodes(op="placeholder")), originals, strict=True):
        if original.name in names:
            _read_by_name(graph, node, names[original.name])
    root: dict[str, Any] = {**program.constants, **program.state_dict}
    root |= dict(program.graph_module.named_children())  # bodies of control flow
    read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    tensors = {name: value for name, value in root.items() if name in read}
    adapted = adapter_layers(program) if find_rotate_nodes(program.graph) else []
    return _subject(fx.GraphModule(tensors, graph), dict(program.named_parameters()), adapted)


def subject_of_operators(module: fx.GraphModule) -> Subject:
    """A `GraphModule` of ATen operators that reads parameters by name, without adapters; its graph is copied.

    Args:
        module: the module, one that `hra_fx.export.captured.is_captured` accepts.
    """
    copied = fx.GraphModule(module, copy.deepcopy(module.graph), type(module).__name__)
    return _subject(copied, dict(module.named_parameters(remove_duplicate=False)), [])


def _own_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model without those of its adapters."""
    return {name: tensor for name, tensor in tensors.items() if REFLECTION not in name.split(".")}


def _remove_rotations(module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> dict[str, GraphLayer]:
    """Remove the rotations and the dead code from a graph, and find its layers."""
    for node in find_rotate_nodes(module.graph):
        remove_rotation(module.graph, node)
    module.graph.eliminate_dead_code()
    weights: dict[str, list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        if node.target in tensors:
            weights.setdefault(str(node.target), []).append(node)
    return find_layers(weights, tensors)


def _subject(module: fx.GraphModule, tensors: Mapping[str, Tensor], adapted: Iterable[LayerAdapter]) -> Subject:
    own = _own_tensors(tensors)
    found = _remove_rotations(module, own)
    classes = module_classes(module.graph)
    skeleton = build_skeleton(found, own, classes, with_output=True)
    layers: dict[str, LayerFacts] = {}
    for layer in adapted:
        parameters = sum(tensor.numel() for key, tensor in own.items() if key.rpartition(".")[0] == layer.path)
        width, detail = int(layer.chain.shape[0]), layer.description.replace("->", "→")
        rank = layer.r + (layers[layer.path].rank if layer.path in layers else 0)  # a weight may have several adapters
        layers[layer.path] = LayerFacts(detail, width, rank, parameters, vectors=width * rank)
        if layer.path in found:
            _tag(layer.path, found[layer.path])
    return Subject(
        model=skeleton,
        graphs={"": module},
        layers=layers,
        aliases={alias: path for path in layers for alias in (found[path].aliases if path in found else ())},
        classes={path: kind.rpartition(".")[2] for path, kind in classes.items()},
        parameters=sum(tensors[names[0]].numel() for names in group_tied(own)),
    )


def _read_by_name(graph: fx.Graph, node: fx.Node, name: str) -> None:
    """Replace a placeholder by `get_attr`."""
    with graph.inserting_before(node):
        read = graph.get_attr(name)
    read.meta = dict(node.meta)
    node.replace_all_uses_with(read)
    graph.erase_node(node)


def _tag(path: str, layer: GraphLayer) -> None:
    """Tag the operators that read the weight of an adapted layer."""
    for use in layer.uses:
        use.consumer.meta[META] = NodeTag(path, layer.kind, "layer")
