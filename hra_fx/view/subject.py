"""The input of a picture for any type of model: traced graphs, their parent modules, and the adapted layers.

A graph of ATen operators, such as an exported program, does not have modules. They are recovered from the names of
weights, the operators and `nn_module_stack`. Rotations are removed from a copy of the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from hra_fx.export.captured import LayerAdapter, adapter_layers
from hra_fx.export.match import find_layers, group_tied, module_classes
from hra_fx.export.program import find_rotate_nodes, remove_rotation
from hra_fx.export.select import build_skeleton
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.target import REFLECTION, describe
from hra_fx.model.state import AdapterState, adapted_layers, get_state

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class LayerFacts:
    """The facts that the box of an adapted layer shows."""

    detail: str  # class and shape of the layer
    width: int  # length `d` of its vectors
    rank: int  # number of vectors in use, over all adapters, including merged ones
    parameters: int  # of the layer itself
    vectors: int  # number of parameters of all its adapters


@dataclass(frozen=True)
class Subject:
    """A model to draw."""

    model: nn.Module  # the modules by name; for a program, a skeleton of modules from its names and calls
    graphs: Mapping[str, fx.GraphModule]  # by path of the module
    layers: Mapping[str, LayerFacts]  # by path, once for each adapted layer
    aliases: Mapping[str, str]  # any path of an adapted layer -> its first path
    classes: Mapping[str, str]  # path of a module -> name of the class
    parameters: int  # of the model, without its adapters
    # node of an operator that reads an adapted weight -> (path of the layer, path of the module around the operator)
    operators: Mapping[fx.Node, tuple[str, str]] = field(default_factory=dict)


def subject_of(model: nn.Module, graphs: Mapping[str, fx.GraphModule]) -> Subject:
    """Create the subject of a model, adapted or not, with graphs that were traced from it."""
    layers = adapted_layers(model)
    first = {layer: path for path, layer in layers.items()}
    named = dict(model.named_modules(remove_duplicate=False))
    state = get_state(model)
    return Subject(
        model=model,
        graphs=graphs,
        layers={path: _facts(layer, state) for path, layer in layers.items()},
        aliases={path: first[part] for path, part in named.items() if part in first},
        classes={path: type(part).__name__ for path, part in named.items()} | _classes_in(model),
        parameters=sum(parameter.numel() for parameter in own_parameters(model)),
    )


def _classes_in(model: nn.Module) -> dict[str, str]:
    """The classes of the modules whose forwards are in a `GraphModule`, which replaces them with plain modules."""
    if not isinstance(model, fx.GraphModule):
        return {}
    found = {path: kind.rpartition(".")[2] for path, kind in module_classes(model.graph).items()}
    plain = {path for path, part in model.named_modules() if type(part) is nn.Module}
    return {path: kind for path, kind in found.items() if path in plain}


def _facts(layer: AdaptedLayer, state: AdapterState | None) -> LayerFacts:
    reflection, used = layer.hra_u, layer.hra_u.active
    if state is not None and reflection.unmerged is not None:  # merged adapters are also in use
        held = {*reflection.active, *state.merged}
        used = tuple(name for name in state.active if name in held and name in reflection)
    rank = sum(reflection.specs[name].r for name in used)
    parameters = sum(parameter.numel() for parameter in own_parameters(layer))
    vectors = sum(parameter.numel() for parameter in reflection.parameters())
    return LayerFacts(describe_module(layer), reflection.width, rank, parameters, vectors)


def name_of(path: str) -> str:
    """The last part of a qualified name; if it is a number, with the part before it.

    >>> name_of("encoder.layer.0.query"), name_of("encoder.layer.0")
    ('query', 'layer.0')
    """
    parts = path.split(".")
    start = -2 if len(parts) > 1 and parts[-1].partition("@")[0].isdigit() else -1
    return ".".join(parts[start:])


def describe_module(module: nn.Module) -> str:
    """The class and shape of a layer, or the class of any other module.

    >>> describe_module(nn.Linear(4, 8)), describe_module(nn.ReLU())
    ('Linear 4→8', 'ReLU')
    """
    text = describe(module).replace("->", "→")
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and set(module.stride) != {1}:
        text += f", stride {module.stride[0] if len(set(module.stride)) == 1 else module.stride}"
    return text


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """A module's parameters without its adapters.

    >>> [tuple(parameter.shape) for parameter in own_parameters(nn.Linear(4, 8))]
    [(8, 4), (8,)]
    """
    return [parameter for path, parameter in module.named_parameters() if REFLECTION not in path.split(".")]


def subject_of_program(program: ExportedProgram) -> Subject:
    """Create the subject of an exported program, transformed or not. Its graph is copied."""
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
    """Create the subject of a `GraphModule` of ATen operators without adapters. Its graph is copied."""
    copied = fx.GraphModule(module, copy.deepcopy(module.graph), type(module).__name__)
    return _subject(copied, dict(module.named_parameters(remove_duplicate=False)), [])


def _subject(module: fx.GraphModule, tensors: Mapping[str, Tensor], adapted: Iterable[LayerAdapter]) -> Subject:
    own = {name: tensor for name, tensor in tensors.items() if REFLECTION not in name.split(".")}
    for node in find_rotate_nodes(module.graph):
        remove_rotation(module.graph, node)
    module.graph.eliminate_dead_code()
    weights: dict[str, list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        if node.target in own:
            weights.setdefault(str(node.target), []).append(node)
    found = find_layers(weights, own)
    classes = module_classes(module.graph)
    skeleton = build_skeleton(found, own, classes)
    layers: dict[str, LayerFacts] = {}
    operators: dict[fx.Node, tuple[str, str]] = {}
    for layer in adapted:
        parameters = sum(tensor.numel() for key, tensor in own.items() if key.rpartition(".")[0] == layer.path)
        width, detail = int(layer.chain.shape[0]), layer.description.replace("->", "→")
        rank = layer.r + (layers[layer.path].rank if layer.path in layers else 0)  # a weight may have several adapters
        layers[layer.path] = LayerFacts(detail, width, rank, parameters, vectors=width * rank)
        if layer.path in found:
            # Attention has more operators than those that read its weight.
            around = layer.path if found[layer.path].kind == "attention" else layer.path.rpartition(".")[0]
            operators |= {use.consumer: (layer.path, around) for use in found[layer.path].uses}
    return Subject(
        model=skeleton,
        graphs={"": module},
        layers=layers,
        aliases={alias: path for path in layers for alias in (found[path].aliases if path in found else ())},
        classes={path: kind.rpartition(".")[2] for path, kind in classes.items()},
        parameters=sum(tensors[names[0]].numel() for names in group_tied(own)),
        operators=operators,
    )


def _read_by_name(graph: fx.Graph, node: fx.Node, name: str) -> None:
    """Replace a placeholder with `get_attr`."""
    with graph.inserting_before(node):
        read = graph.get_attr(name)
    read.meta = dict(node.meta)
    node.replace_all_uses_with(read)
    graph.erase_node(node)
