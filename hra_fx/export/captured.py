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
from torch import Tensor, fx

from hra_fx.compat import OpOverload, is_higher_order
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError, UnsupportedLayerError
from hra_fx.export.editors import ProgramEditor, replace_weights, set_trainable
from hra_fx.export.ops import find_rotate_nodes, insert_rotation, remove_rotation, split_shared_uses
from hra_fx.export.select import init_adapter, select_layers
from hra_fx.functional.chain import plain_chain
from hra_fx.functional.rotate import check_finite, check_foldable, rotate_weight
from hra_fx.layers.containers import ANCHOR, check_adapter_name
from hra_fx.layers.target import REFLECTION, find_kind

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def is_program(value: object) -> bool:
    """Whether a value is a `torch.export.ExportedProgram`. This does not import torch.export."""
    module = sys.modules.get("torch.export")
    return module is not None and isinstance(value, module.ExportedProgram)


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
    """Check that a value is a program.

    Raises:
        AdapterError: the value has another type.
    """
    if is_program(value):
        return
    if isinstance(value, fx.GraphModule) and is_captured(value):
        raise AdapterError(
            f"{function}: the GraphModule consists of operators, not of calls of layers. Pass the ExportedProgram that "
            "it was created from, or convert that to a GraphModule with layers: hra_fx.lift(program). "
            "torch.export.export(module, args) creates a program from any module."
        )
    raise AdapterError(
        f"{function}: expected an ExportedProgram, got {type(value).__name__}. Export the transformed model first: "
        f"hra_fx.{function}(torch.export.export(model, args))."
    )


def transform_captured(captured: ExportedProgram, config: HRAConfig, adapter_name: str = "default") -> ExportedProgram:
    """Add reflections to a program: each selected weight is replaced with `W Q`, one node `hra_fx::rotate`.

    The parameters share memory with the original ones, and are frozen. The `state_dict` and the `graph_signature` also
    contain the parameter `<layer>.hra_u.<adapter>` of shape `(d, r)`, and the buffer `<layer>.hra_u.<adapter>_anchor`
    if `init_weights=True` needs one. Tied weights get separate names, and only the weights of selected layers are
    rotated.

    Args:
        captured: a program from `torch.export.export`, decomposed or not.
        config: the layers to adapt, by their names in the model, the rank, and the initialization.
        adapter_name: name of the adapter, which is part of the names of its parameters.

    Returns:
        A new program, or `captured` itself if it already has this adapter.

    Raises:
        ConfigError: the configuration trains more than reflections.
        SelectionError: the configuration does not fit the graph.
        UnsupportedLayerError: a selected layer does not support reflections.
        AdapterError: the graph has another adapter, or `captured` is not a program.
    """
    check_is_program(captured, "transform")
    check_adapter_name(adapter_name)
    if has_adapter(captured.graph_module, config, adapter_name):
        return captured
    if captured.graph_signature.backward_signature is not None:
        raise UnsupportedLayerError(
            "the program contains a backward pass, which would not compute gradients of the reflections. Transform it "
            "before adding the backward pass."
        )
    editor = ProgramEditor(captured)
    layers = select_layers(editor.graph, editor.weights, editor.parameters, config)
    initials = [init_adapter(layer, editor.parameters[layer.name], config) for layer in layers]
    for layer, (vectors, anchor) in zip(layers, initials, strict=True):
        weight, name = editor.weights[layer.source][0], f"{layer.path}.{REFLECTION}.{adapter_name}"
        vectors_node = editor.add(name, vectors, weight)
        anchor_node = None if anchor is None else editor.add(name + ANCHOR, anchor, weight)
        insert_rotation(editor.graph, layer, weight, vectors_node, anchor_node, apply_GS=config.apply_GS)
    split_shared_uses(layers, editor.weights)
    trainable = [name for name, parameter in editor.parameters.items() if parameter.requires_grad]
    set_trainable(editor, set())
    editor.graph_module.meta = with_metadata(editor.graph_module, config, adapter_name, trainable)
    return editor.build()


def fold_captured(captured: ExportedProgram) -> ExportedProgram:
    """Fold the reflections of a program into its weights. The result has the original graph, node for node.

    All folded weights are computed and checked before any of them is written. They are new tensors; other parameters
    share memory. Tied weights stay separate if only some of their layers are adapted.

    Args:
        captured: a result of `transform_captured`, which may have been decomposed, or saved and loaded.

    Returns:
        A new program.

    Raises:
        AdapterError: the graph has no reflections, or `captured` is not a program.
        FoldError: a weight or its vectors are on the meta device, the folded weight would not be finite, or the vectors
            for Gram-Schmidt are linearly dependent. `captured` is unchanged.
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
    metadata = get_metadata(editor.graph_module)
    if metadata is not None:
        set_trainable(editor, set(metadata["trainable"]))
    editor.graph_module.meta = without_metadata(editor.graph_module)
    return editor.build()


class Rotation(NamedTuple):
    """A node of `hra_fx::rotate`, and the tensors that it reads.

    Attributes:
        node: the node.
        weight_name, vectors_name: names of the tensors.
        weight: the base weight.
        vectors, anchor: the adapter.
        apply_GS, transposed: the other arguments of the operator.
    """

    node: fx.Node
    weight_name: str
    vectors_name: str
    weight: Tensor
    vectors: Tensor
    anchor: Tensor | None
    apply_GS: bool
    transposed: bool


def rotations_of(editor: ProgramEditor) -> list[Rotation]:
    """The rotations of a graph, in order.

    Raises:
        AdapterError: the graph does not have rotations.
    """
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


def with_metadata(
    graph_module: fx.GraphModule, config: HRAConfig, adapter_name: str, trainable: list[str]
) -> dict[str, Any]:
    """Add the metadata of an adapter, in a form that JSON can represent, to a copy of the `meta` of a graph.

    Args:
        graph_module: the graph; it is not modified.
        config: the configuration of the adapter.
        adapter_name: the name of the adapter.
        trainable: names of the parameters that required gradients before.
    """
    metadata = {"adapter": adapter_name, "config": config.to_dict(), "trainable": trainable}
    return {**graph_module.meta, "custom": {**graph_module.meta.get("custom", {}), _KEY: metadata}}


def without_metadata(graph_module: fx.GraphModule) -> dict[str, Any]:
    """The `meta` of a graph without what `with_metadata` added."""
    custom = {key: value for key, value in graph_module.meta.get("custom", {}).items() if key != _KEY}
    rest = {key: value for key, value in graph_module.meta.items() if key != "custom"}
    return {**rest, "custom": custom} if custom else rest


def has_adapter(graph_module: fx.GraphModule, config: HRAConfig, adapter_name: str) -> bool:
    """Whether a graph already has this adapter.

    Raises:
        AdapterError: the graph has another adapter, or this adapter with another configuration.
    """
    metadata = get_metadata(graph_module)
    if metadata is None and not find_rotate_nodes(graph_module.graph):
        return False
    if metadata is not None and metadata["adapter"] == adapter_name and metadata["config"] == config.to_dict():
        return True
    present = "reflections" if metadata is None else f"the adapter {metadata['adapter']!r}"
    same_name = metadata is not None and metadata["adapter"] == adapter_name
    raise AdapterError(
        f"adapter {adapter_name!r}: the graph already has {present}{' with another configuration' * same_name}; a "
        "captured graph can have only one adapter. Fold it first (hra_fx.fold), or transform the original graph."
    )
