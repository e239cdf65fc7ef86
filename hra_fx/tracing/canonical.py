"""Convert a program that was captured with layers as operators into a graph that calls the modules of a model.

Two captures of the same call, in train and in eval mode, have insignificant differences in names and in the order of
reads. Here they get the same form, so that they can be compared node by node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import ASSERT_METADATA
from hra_fx.errors import CaptureError
from hra_fx.tracing.by_mode import ByMode
from hra_fx.tracing.exported import CALL_LAYER
from hra_fx.tracing.graph_module import attribute
from hra_fx.tracing.inputs import Condition, argument_names, call_of, conditions_of, nest
from hra_fx.tracing.tracer import UnpicklingTracer

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: The name of the module that checks the inputs.
CHECKS = "check_inputs"
_SIZE = torch.ops.aten.sym_size.int


class Canonical(NamedTuple):
    """The graph of a model in one mode.

    Attributes:
        graph: the graph. It first calls `CHECKS`, then the model's layers.
        constants: name -> nested graph that is not part of the model, or a tensor that its forward creates (a
            `ByMode`).
        conditions: the conditions on the inputs.
        sizes: for each size that may change, (index of the flat input, dimension) of all inputs with this size.
    """

    graph: fx.Graph
    constants: dict[str, nn.Module]
    conditions: list[Condition]
    sizes: list[list[tuple[int, int]]]


class InBlockError(CaptureError):
    """Layers are called in a block that has a separate graph.

    Attributes:
        paths: the layers.
    """

    def __init__(self, paths: list[str]) -> None:
        """Store the paths."""
        super().__init__(
            f"{paths[0]} is called under torch.autocast or another grad mode, or in a branch of torch.cond, which has "
            "a separate graph"
        )
        self.paths = paths


def canonical(program: ExportedProgram, model: nn.Module) -> Canonical:
    """Convert the graph of a program to one that uses the modules and tensors of the captured model.

    Raises:
        InBlockError: layers are called in a block with a separate graph.
    """
    module: Any = program.module(check_guards=False)
    graph: fx.Graph = module.graph
    graph.owning_module = None  # this module does not have layers to call
    names = argument_names(model, *call_of(program))
    places = nest(graph, program, names)
    conditions = conditions_of(program, names, places)
    _call_layers(graph)
    constants = name_constants(graph, program, module)
    if inside := [path for part in constants.values() for path in _layers_in(part)]:
        raise InBlockError(inside)
    simplify(graph, places, model)
    _read_where_used(graph)
    return Canonical(graph, constants, conditions, _sizes(places))


def _sizes(places: list[fx.Node]) -> list[list[tuple[int, int]]]:
    found = defaultdict(list)
    for index, place in enumerate(places):
        for dimension, size in enumerate(getattr(place.meta.get("val"), "shape", ())):
            if str(size).isidentifier():  # a symbol, not a number or an expression
                found[str(size)].append((index, dimension))
    return list(found.values())


def simplify(graph: fx.Graph, places: list[fx.Node], model: nn.Module) -> None:
    """Change a graph of `torch.export` in place so that it can be moved, copied and pickled, and checks its inputs.

    Args:
        graph: the graph, with nested arguments and results.
        places: the nodes of the flat inputs.
        model: the module with the tensors of the graph.
    """
    _simplify_casts(graph)
    _hoist_sizes(graph, places)
    _follow_device(graph, places, model)
    graph.eliminate_dead_code(_is_kept)
    if places:
        with graph.inserting_after(max(places)):
            graph.call_module(CHECKS, tuple(places))
    graph._tracer_cls = UnpicklingTracer


def _is_kept(node: fx.Node) -> bool:
    """Whether a node without users has side effects: batch norm updates its buffers."""
    return node.op == "call_module" or node.is_impure()


def _simplify_casts(graph: fx.Graph) -> None:
    """Remove the aliases that the capture added, and the dtype checks, which fail under autocast. Casts are nodes."""
    for node in graph.find_nodes(op="call_function", target=ASSERT_METADATA):
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def _layers_in(constant: nn.Module) -> Iterator[str]:
    """The paths of the layers that a nested graph calls."""
    for part in constant.modules():
        if isinstance(part, fx.GraphModule):
            yield from (str(node.args[1]) for node in part.graph.find_nodes(op="call_function", target=CALL_LAYER))


def _call_layers(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=CALL_LAYER):
        with graph.inserting_before(node):
            call = graph.call_module(node.args[1], node.args[:1])
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        copied = call.next
        if copied.target is torch.ops.aten.clone.default and list(call.users) == [copied]:
            copied.replace_all_uses_with(call)
            graph.erase_node(copied)


def name_constants(graph: fx.Graph, program: ExportedProgram, module: nn.Module) -> dict[str, nn.Module]:
    """Number nested graphs, and tensors that a forward creates, in the order of their first use.

    Args:
        graph: the graph of a program. It is changed: modules return the tensors.
        program: the program.
        module: the module of the program.

    Returns:
        Name -> graph or module.
    """
    names: dict[str, str] = {}
    made: dict[str, nn.Module] = {}
    for node in graph.find_nodes(op="get_attr", sort=True):
        if node.users and node.target in program.graph_signature.lifted_tensor_constants:
            value = program.constants[node.target].detach()
            name = names.setdefault(node.target, f"constant_{len(names)}")
            made[name] = ByMode(value, value)
            with graph.inserting_before(min(node.users)):  # after the inputs, because they determine the device
                call = graph.call_module(name, (value.device,))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
        elif isinstance(block := attribute(module, node.target), fx.GraphModule):
            node.target = names.setdefault(node.target, f"block_{len(names)}")
            made[node.target] = block
    return made


def _read_where_used(graph: fx.Graph) -> None:
    """Read each tensor before its first use."""
    for node in graph.find_nodes(op="get_attr", sort=True):
        if node.users:
            min(node.users).prepend(node)
        else:
            graph.erase_node(node)


def module_path(node: fx.Node) -> str | None:
    """The path of the module whose forward contains a node, `""` for the root; `None` if this is unknown.

    Example:
        >>> program = torch.export.export(torch.nn.Sequential(torch.nn.Linear(3, 2)), (torch.randn(1, 3),))
        >>> module_path(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0])
        '0'
    """
    stack = node.meta.get("nn_module_stack")
    return normalize_path(list(stack.values())[-1][0]) if stack else None


def normalize_path(path: str) -> str:
    """Convert a path of `nn_module_stack`, which TorchDynamo writes as Python code, to the form of `named_modules`.

    Example:
        >>> normalize_path("L['self'].blocks[0].proj"), normalize_path("L['self']._modules['blocks']._modules['0']")
        ('blocks.0.proj', 'blocks.0')
    """
    for before, after in (("L['self']", ""), ("._modules[", "["), ("['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(before, after)
    return path.strip(".")


def _hoist_sizes(graph: fx.Graph, places: list[fx.Node]) -> None:
    """Read each size of an input once, at the start of the graph, from the first input with this size."""
    first: dict[str, tuple[fx.Node, int]] = {}
    for place in places:
        for dimension, size in enumerate(getattr(place.meta.get("val"), "shape", ())):
            first.setdefault(str(size), (place, dimension))
    reads = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=_SIZE):
        if node.args[0] in places:
            reads[str(node.args[0].meta["val"].shape[node.args[1]])].append(node)
    for size in reversed([size for size in first if size in reads]):  # each is inserted before the previous ones
        with graph.inserting_after(max(places)):
            read = graph.call_function(_SIZE, first[size])
        read.meta = dict(reads[size][0].meta)
        for node in reads[size]:
            node.replace_all_uses_with(read)
            graph.erase_node(node)


def _follow_device(graph: fx.Graph, places: list[fx.Node], model: nn.Module) -> None:
    """Create new tensors on the device of the first input, so that the graph can be moved to another device.

    A model on several devices keeps the captured devices.
    """
    tensors = [place for place in places if isinstance(place.meta.get("val"), Tensor)]
    devices = {value.device for value in (*model.parameters(), *model.buffers(), *(x.meta["val"] for x in tensors))}
    if len(devices) != 1 or not tensors:
        return
    with graph.inserting_after(max(places)):
        device = graph.call_function(getattr, (tensors[0], "device"))
    for node in graph.nodes:
        node.args = tuple(device if isinstance(value, torch.device) else value for value in node.args)
        node.kwargs = {key: device if isinstance(value, torch.device) else value for key, value in node.kwargs.items()}
    if not device.users:
        graph.erase_node(device)
