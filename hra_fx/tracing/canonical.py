"""Convert a program of `torch.export` to a graph in canonical form.

A program that was captured with layers as operators becomes a graph that calls the modules of a model. Two captures of
the same call, in train and in eval mode, have insignificant differences in names and in the order of reads. Here they
get the same form, so that they can be compared node by node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import ASSERT_METADATA, ASSERT_SCALAR, is_higher_order
from hra_fx.errors import CaptureError
from hra_fx.model.graph_module import UnpicklingTracer
from hra_fx.tracing.by_mode import ByMode
from hra_fx.tracing.exported import CALL_LAYER, exporting
from hra_fx.tracing.graph_module import NestedGraph, attribute, graph_module, replace_node
from hra_fx.tracing.inputs import Condition, argument_names, call_of, conditions_of, nest, shown_names

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: The name of the module that checks the inputs.
CHECKS = "check_inputs"
_SIZE = torch.ops.aten.sym_size.int


class Canonical(NamedTuple):
    """The graph of a model in one mode. It first calls `CHECKS`, then the model's layers.

    Attributes:
        constants: name -> `NestedGraph`, or a tensor that the forward creates (a `ByMode`).
        names: those of the flat inputs.
        sizes: for each size that may change, (index of the flat input, dimension) of all inputs with this size.
    """

    graph: fx.Graph
    constants: dict[str, nn.Module]
    conditions: list[Condition]
    names: list[str]
    sizes: list[list[tuple[int, int]]]


class InBlockError(CaptureError):
    """Layers are called in a block that has a separate graph."""

    def __init__(self, paths: list[str]) -> None:
        """Store the paths of the layers."""
        super().__init__(
            f"{paths[0]} is called under torch.autocast or another grad mode, or in a branch of torch.cond, which has "
            "a separate graph"
        )
        self.paths = paths


def canonical(program: ExportedProgram, model: nn.Module) -> Canonical:
    """Convert the graph of a program to one that uses the modules and tensors of the captured model."""
    with exporting():  # torch cannot write the code of some programs, such as one with a layer called "in"
        module: fx.GraphModule = program.module(check_guards=False)
    graph = module.graph
    graph.owning_module = None  # this module does not have layers to call
    names = argument_names(model, *call_of(program))
    inputs = nest(graph, program, names)
    conditions = conditions_of(program, names, inputs)
    for node in graph.find_nodes(op="call_function", target=CALL_LAYER):
        call = replace_node(node, "call_module", node.args[1], node.args[:1])
        copied = call.next  # the capture copies outputs, in case the model writes into them
        if copied.target is torch.ops.aten.clone.default and list(call.users) == [copied]:
            copied.replace_all_uses_with(call)
            graph.erase_node(copied)
    constants = _name_constants(graph, program, module)
    blocks = [block for part in constants.values() for block in part.modules() if isinstance(block, fx.GraphModule)]
    calls = [node for block in blocks for node in block.graph.find_nodes(op="call_function", target=CALL_LAYER)]
    if calls:
        raise InBlockError([str(node.args[1]) for node in calls])
    _simplify(graph, inputs, model)
    constants = call_nested(graph, constants)
    for node in graph.find_nodes(op="get_attr", sort=True):  # the order of reads differs between captures
        min(node.users).prepend(node)
    # A symbol is a size that may change; the others are numbers and expressions.
    sizes = [found for size, found in _sizes(inputs).items() if size.isidentifier()]
    return Canonical(graph, constants, conditions, shown_names(program, names), sizes)


def _sizes(inputs: list[fx.Node]) -> dict[str, list[tuple[int, int]]]:
    """Each size of the inputs -> (index of the input, dimension) of all inputs with this size."""
    found = defaultdict(list)
    for index, node in enumerate(inputs):
        for dimension, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            found[str(size)].append((index, dimension))
    return found


def _simplify(graph: fx.Graph, inputs: list[fx.Node], model: nn.Module) -> None:
    """Change a graph of `torch.export` in place so that it can be moved, copied and pickled, and checks its inputs."""
    # Dtype checks fail under autocast. The capture added the aliases; casts are nodes.
    for node in graph.find_nodes(op="call_function", target=ASSERT_METADATA):
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=ASSERT_SCALAR):
        _explain(node)
    _hoist_sizes(graph, inputs)
    _follow_device(graph, inputs, model)
    if inputs:
        with graph.inserting_after(max(inputs)):
            graph.call_module(CHECKS, tuple(inputs))
    # Modules and blocks have side effects: batch norm, and a moving average under torch.no_grad, update buffers.
    graph.eliminate_dead_code(lambda node: node.op == "call_module" or node.is_impure() or is_higher_order(node.target))


def _explain(check: fx.Node) -> None:
    """Write the message of a check of values, such as the number of end tokens."""
    place = check.meta.get("stack_trace", "").strip().rsplit("File ", 1)[-1].split("\n")
    where = f" at {place[0].rpartition('/')[2]}, `{place[-1].strip()}`".replace('"', "") if place[-1] else ""
    message = (
        f"the graph was captured for inputs whose values take another way{where}. Call the original model, or capture "
        "it for these inputs: pass them as `example_inputs` to hra_fx.transform(..., trace=True)."
    )
    check.args = (check.args[0], message)


def _name_constants(graph: fx.Graph, program: ExportedProgram, module: nn.Module) -> dict[str, nn.Module]:
    """Number nested graphs, and tensors that a forward creates, in the order of their first use."""
    names: dict[str, str] = {}
    made: dict[str, nn.Module] = {}
    for node in graph.find_nodes(op="get_attr", sort=True):
        if node.users and node.target in program.graph_signature.lifted_tensor_constants:
            value = program.constants[node.target].detach()
            name = names.setdefault(node.target, f"constant_{len(names)}")
            made[name] = ByMode(value, value)
            call = replace_node(node, "call_module", name, (value.device,))
            min(call.users).prepend(call)  # after the inputs, because they determine the device
        elif isinstance(block := attribute(module, node.target), fx.GraphModule):
            node.target = names.setdefault(node.target, f"block_{len(names)}")
            made[node.target] = block
    return made


def captured_module(model: nn.Module, parts: Mapping[str, nn.Module], graph: fx.Graph) -> fx.GraphModule:
    """Create a GraphModule from a captured graph, with the modules and tensors of a model, and additional parts."""
    if taken := next((name for name in parts if hasattr(model, name)), None):
        raise CaptureError(f"its attribute {taken!r} has a name that a graph uses for itself. Rename it")
    return graph_module(model, graph, parts)


def call_nested(graph: fx.Graph, parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Replace operators that have graphs as arguments with calls of modules, in place. Returns all parts to add."""
    made = {name: part for name, part in parts.items() if not isinstance(part, fx.GraphModule)}
    for node in [node for node in graph.nodes if is_higher_order(node.target)]:
        reads = {place: arg for place, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr"}
        found = {place: parts.get(str(read.target)) for place, read in reads.items()}
        bodies = {place: body for place, body in found.items() if isinstance(body, fx.GraphModule)}
        for body in bodies.values():
            for name, part in call_nested(body.graph, dict(body.named_children())).items():
                body.add_module(name, part)
            body.recompile()
            vars(body)["_tracer_cls"] = UnpicklingTracer  # that of torch.export cannot unpickle it
        name = f"nested_{len(made)}"
        made[name] = NestedGraph(str(node.target), bodies)
        args = tuple(arg for place, arg in enumerate(node.args) if place not in bodies)
        replace_node(node, "call_module", name, args, node.kwargs)
        for read in reads.values():
            if not read.users:
                graph.erase_node(read)
    return made


def _hoist_sizes(graph: fx.Graph, inputs: list[fx.Node]) -> None:
    """Read each size of an input once, at the start of the graph, from the first input with this size.

    Otherwise the two modes may read a size from different inputs.
    """
    reads = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=_SIZE):
        if node.args[0] in inputs:
            reads[str(node.args[0].meta["val"].shape[node.args[1]])].append(node)
    last = max(inputs, default=None)
    for size, ((index, dimension), *_) in _sizes(inputs).items():
        if size in reads:
            with graph.inserting_after(last):
                last = graph.call_function(_SIZE, (inputs[index], dimension))
            last.meta = dict(reads[size][0].meta)
            for node in reads[size]:
                node.replace_all_uses_with(last)
                graph.erase_node(node)


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
