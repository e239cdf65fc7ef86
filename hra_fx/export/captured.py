"""`transform` and `fold` for programs of `torch.export`.

program = hra_fx.transform(torch.export.export(model, args), config)
module = program.module()                 # shares its parameters with the program: train it as usual
program = hra_fx.fold(program)            # the original graph, with the trained adapter in its weights

A program is not modified. Parameters are replaced with new ones that share the same memory, so the captured model does
not change.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import OpOverload, is_higher_order, require
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError, UnsupportedLayerError
from hra_fx.export.match import GraphLayer, find_layers, module_classes
from hra_fx.export.program import (
    ProgramEditor,
    find_rotate_nodes,
    insert_rotation,
    remove_rotation,
    replace_weights,
    set_trainable,
)
from hra_fx.export.select import build_skeleton, init_adapter, layer_of, make_layer, select_layers
from hra_fx.functional.chain import plain_chain
from hra_fx.functional.rotate import check_finite, check_foldable, rotate_weight
from hra_fx.functional.statistics import readable_rows
from hra_fx.layers.containers import ANCHOR, check_adapter_name
from hra_fx.layers.target import REFLECTION, LayerKind, describe, find_kind

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def is_program(value: object) -> bool:
    """Whether a value is a `torch.export.ExportedProgram`. This does not import torch.export."""
    module = sys.modules.get("torch.export")
    found = module is not None and isinstance(value, module.ExportedProgram)
    if found:
        require("a program of torch.export")
    return found


def is_captured(value: object) -> bool:
    """Whether a value is a program, or a `GraphModule` of ATen operators that read parameters, without layer calls."""
    if not isinstance(value, fx.GraphModule):
        return is_program(value)
    called = (value.get_submodule(str(node.target)) for node in value.graph.find_nodes(op="call_module"))
    if any(find_kind(part) for part in called):
        return False
    parameters = dict(value.named_parameters(remove_duplicate=False))
    nodes = [node for node in value.graph.find_nodes(op="get_attr") if node.target in parameters]
    users = [user.target for node in nodes for user in node.users]
    # All layers may be in nested graphs, for example under torch.autocast.
    return any(isinstance(target, OpOverload) or is_higher_order(target) for target in users)


def check_is_program(value: object, function: str) -> None:
    """Check that a value is a program."""
    if is_program(value):
        return
    if is_captured(value):
        raise AdapterError(
            f"{function}: the GraphModule consists of operators, not of calls of layers. Pass the ExportedProgram that "
            "it was created from, or convert that to a GraphModule with layers: hra_fx.lift(program)."
        )
    raise AdapterError(
        f"{function}: expected an ExportedProgram, got {type(value).__name__}. Export the transformed model first: "
        f"hra_fx.{function}(torch.export.export(model, args))."
    )


def check_has_no_backward(program: ExportedProgram, action: str) -> None:
    """Check that a program does not contain a backward pass."""
    if program.graph_signature.backward_signature is not None:
        raise UnsupportedLayerError(
            "the program contains a backward pass, which would not compute gradients of the reflections. "
            f"{action} it before adding the backward pass."
        )


def transform_captured(captured: ExportedProgram, config: HRAConfig, adapter_name: str = "default") -> ExportedProgram:
    """Add reflections to a program: each selected weight is replaced with `W Q`, one node `hra_fx::rotate`.

    The parameters share memory with the original ones, and are frozen. The `state_dict` and the `graph_signature` also
    contain the parameter `<layer>.hra_u.<adapter>` of shape `(d, r)`, and the buffer `<layer>.hra_u.<adapter>_anchor`
    if `init_weights=True` needs one. Tied weights get separate names, and only the weights of selected layers are
    rotated. A program that already has this adapter is returned as it is.
    """
    check_is_program(captured, "transform")
    check_adapter_name(adapter_name)
    if has_adapter(captured.graph_module, config, adapter_name):
        return captured
    check_has_no_backward(captured, "Transform")
    editor = ProgramEditor(captured)
    layers = select_layers(editor.graph, editor.weights, editor.parameters, config)
    initials = [init_adapter(layer, editor.parameters[layer.name], config) for layer in layers]
    for layer, (vectors, anchor) in zip(layers, initials, strict=True):
        weight, name = editor.weights[layer.source][0], f"{layer.path}.{REFLECTION}.{adapter_name}"
        vectors_node = editor.add(name, vectors, weight)
        anchor_node = None if anchor is None else editor.add(name + ANCHOR, anchor, weight)
        insert_rotation(editor.graph, layer, weight, vectors_node, anchor_node, apply_GS=config.apply_GS)
    for use, name in (other for layer in layers for other in layer.others):
        # Other layers with the same weight read it by their own names; the uses by adapted layers are replaced already.
        use.first_user.replace_input_with(use.weight, editor.weights[name][0])
    trainable = [name for name, parameter in editor.parameters.items() if parameter.requires_grad]
    set_trainable(editor, set())
    metadata = {"adapter": adapter_name, "config": config.to_dict(), "trainable": trainable}
    editor.graph_module.meta["custom"] = {**editor.graph_module.meta.get("custom", {}), _KEY: metadata}
    return editor.build()


def fold_captured(captured: ExportedProgram) -> ExportedProgram:
    """Fold the reflections of a program into its weights. The result has the original graph, node for node.

    All folded weights are computed and checked before any of them is written. They are new tensors; other parameters
    share memory. Tied weights stay separate if only some of their layers are adapted.
    """
    check_is_program(captured, "fold")
    editor = ProgramEditor(captured)
    rotations = rotations_of(editor)
    folded: dict[str, Tensor] = {}
    for rotation in rotations:
        name = rotation.weight_name
        folded[name] = _folded(rotation, folded.get(name, rotation.weight))
    replace_weights(editor, folded)
    for rotation in rotations:
        for leftover in remove_rotation(editor.graph, rotation.node):
            editor.remove_if_unused(leftover)
    if metadata := drop_metadata(editor.graph_module):
        set_trainable(editor, set(metadata["trainable"]))
    return editor.build()


class Rotation(NamedTuple):
    """A node of `hra_fx::rotate`, and the tensors that it reads."""

    node: fx.Node
    weight_name: str
    vectors_name: str
    weight: Tensor
    vectors: Tensor
    anchor: Tensor | None
    apply_GS: bool
    transposed: bool


def rotations_of(editor: ProgramEditor) -> list[Rotation]:
    """The rotations of a graph, in order."""
    found = []
    for node in find_rotate_nodes(editor.graph):
        arguments: list[Any] = list(node.args[:3])
        names: list[Any] = [None if argument is None else editor.names[argument.name] for argument in arguments]
        weight, vectors, anchor = (None if name is None else editor.tensor(name).detach() for name in names)
        assert weight is not None and vectors is not None
        flags = (bool(argument) for argument in node.args[3:])
        found.append(Rotation(node, names[0], names[1], weight, vectors, anchor, *flags))
    if not found:
        raise AdapterError("the graph has no reflections. Transform it first: hra_fx.transform(program, config).")
    return found


def _folded(rotation: Rotation, weight: Tensor) -> Tensor:
    """Compute a folded weight in float64 (float32 on MPS), and cast it to the dtype of the base weight."""
    name, apply_GS = rotation.weight_name, rotation.apply_GS
    check_foldable(name, weight, rotation.vectors, apply_GS=apply_GS)
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    chain = plain_chain(rotation.vectors.to(dtype), rotation.anchor, apply_GS=apply_GS)
    folded = rotate_weight(weight.to(dtype), chain, transposed=rotation.transposed).to(weight.dtype)
    check_finite(name, folded)
    return folded


# --- metadata ---------------------------------------------------------------------------------------------------------
# Name and configuration of the adapter, and which parameters were trainable before. They are stored in
# `graph_module.meta["custom"]`, the only entry that `torch.export.save` keeps.

_KEY = "hra_fx"


def get_metadata(graph_module: fx.GraphModule) -> Any:
    """The metadata of the adapter, a dict with `adapter`, `config` and `trainable`; `None` if there is none."""
    return graph_module.meta.get("custom", {}).get(_KEY)


def drop_metadata(graph_module: fx.GraphModule) -> Any:
    """Remove the metadata of the adapter, and return it."""
    metadata = get_metadata(graph_module)
    if metadata is not None:
        custom = {key: value for key, value in graph_module.meta.pop("custom").items() if key != _KEY}
        graph_module.meta |= {"custom": custom} if custom else {}
    return metadata


def has_adapter(graph_module: fx.GraphModule, config: HRAConfig, adapter_name: str) -> bool:
    """Whether a graph already has this adapter. Another adapter is an error."""
    metadata = get_metadata(graph_module)
    if metadata is None and not find_rotate_nodes(graph_module.graph):
        return False
    if metadata is not None and (metadata["adapter"], metadata["config"]) == (adapter_name, config.to_dict()):
        return True
    raise AdapterError(
        f"adapter {adapter_name!r}: the graph already has another adapter or configuration, and a captured graph can "
        "have only one. Fold it first (hra_fx.fold), or transform the original graph."
    )


# --- layers -----------------------------------------------------------------------------------------------------------


class LayerAdapter(NamedTuple):
    """The adapter of one layer of a captured graph.

    Attributes:
        r: number of trained vectors.
        chain: the adapter as plain reflections, `(d, k)`.
        rows: the weight as `(out, d)`; `None` if it cannot be read.
    """

    path: str
    description: str
    adapter: str
    r: int
    chain: Tensor
    rows: Tensor | None


class UnadaptedLayers(NamedTuple):
    """The layers of a captured graph that do not have reflections, but are of a supported kind.

    Attributes:
        skeleton: the model on which layers are selected.
        config: the configuration of the adapter; `None` if the graph does not have its metadata anymore.
        layers: path -> (kind, description, why the weight cannot be rotated or `None`).
    """

    skeleton: nn.Module
    config: HRAConfig | None
    adapter: str
    layers: dict[str, tuple[LayerKind, str, str | None]]


def adapter_layers(program: ExportedProgram) -> list[LayerAdapter]:
    """The adapter of each layer of a program, in the order of the graph."""
    editor = ProgramEditor(program)
    rotations, found = rotations_of(editor), []
    for rotation in rotations:
        remove_rotation(editor.graph, rotation.node)
    layers = find_layers(editor.weights, editor.parameters)
    for rotation in rotations:
        container, _, adapter = rotation.vectors_name.rpartition(".")
        path, vectors, weight = container.removesuffix(f".{REFLECTION}"), rotation.vectors, rotation.weight
        chain = plain_chain(vectors, rotation.anchor, apply_GS=rotation.apply_GS)
        rows = readable_rows(weight, vectors.shape[0], fan_in_fan_out=rotation.transposed)
        # A decomposition may have changed the weight of a linear layer to a form that is not recognized.
        description = _describe(layers[path], weight) if path in layers else describe(make_layer("linear", weight))
        found.append(LayerAdapter(path, description, adapter, vectors.shape[1], chain, rows))
    return found


def unadapted_layers(program: ExportedProgram) -> UnadaptedLayers:
    """The layers of a program without reflections, and the configuration of its adapter."""
    editor = ProgramEditor(program)
    metadata = get_metadata(editor.graph_module)
    config = None if metadata is None else HRAConfig.from_dict(metadata["config"])
    parameters = editor.parameters
    layers = find_layers(editor.weights, parameters)
    found = {
        path: (layer.kind, _describe(layer, parameters[layer.name]), layer.refusal)
        for path, layer in layers.items()
        if layer.is_candidate
    }
    skeleton = build_skeleton(layers, parameters, module_classes(editor.graph))
    return UnadaptedLayers(skeleton, config, "" if metadata is None else metadata["adapter"], found)


def _describe(layer: GraphLayer, weight: Tensor) -> str:
    """Describe a layer as `hra_fx.layers.target.describe` describes the original layer."""
    return "Conv1D {}->{}".format(*weight.shape) if layer.transposed else describe(layer_of(layer, weight))
