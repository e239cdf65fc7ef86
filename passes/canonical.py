"""Convert a program of `torch.export` to a graph in canonical form.

A program that was captured with layers as operators becomes a graph that calls the modules of a model. Two captures of
the same call, in train and in eval mode, have insignificant differences in names and in the order of reads. Here they
get the same form, so that they can be compared node by node.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import ASSERT_METADATA
from hra_fx.errors import CaptureError
from hra_fx.passes.blocks import inline_blocks
from hra_fx.passes.exported import CALL_LAYER, exporting
from hra_fx.passes.inputs import Inputs, conditions_of, nest
from hra_fx.passes.nodes import line_of, replace_node

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: The name of the module that checks the inputs.
CHECKS = "check_inputs"


class Canonical(NamedTuple):
    """The graph of a model in one mode. It first calls `CHECKS`, then the model's layers.

    Attributes:
        graph: calls and operators of the model.
        constants: name of a call in the graph -> the tensor that it returns, which the forward creates.
        conditions: those on its inputs, as expressions.
        inputs: its arguments and the values in them.
        sizes: for each size that may change, (index of the flat input, dimension) of all inputs with this size.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    conditions: list[str]
    inputs: Inputs
    sizes: list[list[tuple[int, int]]]


def canonical(program: ExportedProgram, model: nn.Module) -> Canonical:
    """Convert the graph of a program to one that uses the modules and tensors of the captured model."""
    with exporting():  # torch cannot write the code of some programs, such as one with a layer called "in"
        module: fx.GraphModule = program.module(check_guards=False)
    inline_blocks(module)
    graph = module.graph
    graph.owning_module = None  # this module does not have layers to call
    inputs = nest(graph, program, model)
    conditions = conditions_of(program, inputs)
    for node in graph.find_nodes(op="call_function", target=CALL_LAYER):
        call = replace_node(node, "call_module", node.args[1], node.args[:1])
        copied = call.next  # the capture copies outputs, in case the model writes into them
        if copied.target is torch.ops.aten.clone.default and list(call.users) == [copied]:
            copied.replace_all_uses_with(call)
            graph.erase_node(copied)
    constants = _name_constants(graph, program)
    _simplify(graph, inputs, model)
    for node in graph.find_nodes(op="get_attr", sort=True):  # the order of reads differs between captures
        min(node.users).prepend(node)
    places = defaultdict(list)
    for index, node in enumerate(inputs.flat):
        for dimension, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            places[str(size)].append((index, dimension))
    # A symbol is a size that may change; the others are numbers and expressions.
    sizes = [found for size, found in places.items() if size.isidentifier()]
    return Canonical(graph, constants, conditions, inputs, sizes)


def _simplify(graph: fx.Graph, inputs: Inputs, model: nn.Module) -> None:
    """Change a graph of `torch.export` in place so that it can be moved, copied and pickled, and checks its inputs."""
    # Dtype checks fail under autocast. The capture added the aliases; casts are nodes.
    for node in graph.find_nodes(op="call_function", target=ASSERT_METADATA):
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    _follow_device(graph, inputs.flat, model)
    if inputs.arguments:
        with graph.inserting_after(max(inputs.arguments)):
            graph.call_module(CHECKS, tuple(inputs.arguments))
    graph.eliminate_dead_code(lambda node: node.op == "call_module" or node.is_impure())  # batch norm updates buffers


def _name_constants(graph: fx.Graph, program: ExportedProgram) -> dict[str, Tensor]:
    """Number the tensors that a forward creates, in the order of their first use."""
    names: dict[str, str] = {}
    made: dict[str, Tensor] = {}
    for node in graph.find_nodes(op="get_attr", sort=True):
        if node.target in program.graph_signature.lifted_custom_objs:
            kind = type(program.constants[node.target]).__name__
            raise CaptureError(f"it uses a {kind}{line_of(next(iter(node.users)))}, which a graph cannot have")
        if node.users and node.target in program.graph_signature.lifted_tensor_constants:
            name = names.setdefault(node.target, f"constant_{len(names)}")
            made[name] = program.constants[node.target].detach()
            call = replace_node(node, "call_module", name, (made[name].device,))
            min(call.users).prepend(call)  # after the inputs, because they determine the device
    return made


def _follow_device(graph: fx.Graph, inputs: list[fx.Node], model: nn.Module) -> None:
    """Create new tensors on the device of the first input, so that the graph can be moved to another device.

    A model on several devices keeps the captured devices.
    """
    tensors = [node for node in inputs if isinstance(node.meta.get("val"), Tensor)]
    devices = {value.device for value in (*model.parameters(), *model.buffers(), *(x.meta["val"] for x in tensors))}
    if len(devices) != 1 or not tensors:
        return
    with graph.inserting_after(max(inputs)):
        device = graph.call_function(getattr, (tensors[0], "device"))
    for node in graph.nodes:
        node.args = tuple(device if isinstance(value, torch.device) else value for value in node.args)
        node.kwargs = {key: device if isinstance(value, torch.device) else value for key, value in node.kwargs.items()}
    if not device.users:
        graph.erase_node(device)
