"""GraphModules that share the modules and parameters of a model, from graphs of torch.fx or of `torch.export`.

A program that was captured with layers as operators becomes a graph that calls the modules of a model. Two captures of
the same call, in train and in eval mode, have insignificant differences in names and in the order of reads. Here they
get the same form, so that they can be compared node by node.

Blocks with a separate graph, such as a block under `torch.no_grad`, become modules of a captured graph. fx unpickles a
graph by tracing its code, which would inline such a graph without its context, but calls of modules stay calls.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import ASSERT_METADATA, ASSERT_SCALAR, NON_PERSISTENT, is_higher_order
from hra_fx.errors import CaptureError
from hra_fx.model.graph_module import GraphOfMode, UnpicklingTracer
from hra_fx.tracing.by_mode import ByMode
from hra_fx.tracing.exported import CALL_LAYER, exporting
from hra_fx.tracing.inputs import Condition, argument_names, call_of, conditions_of, nest, shown_names

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: The name of the module that checks the inputs.
CHECKS = "check_inputs"
_SIZE = torch.ops.aten.sym_size.int


#: What fx changes in copies: it makes all tensors that are read at the root persistent buffers, and drops other names.
_KEPT = ("_parameters", "_buffers", NON_PERSISTENT, "_modules")


class ModelGraph(fx.GraphModule):
    """A graph whose copies and pickles have its own `state_dict`. Its errors say that it is a graph of one call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph."""
        try:
            return super().__call__(*args, **kwargs)
        except TypeError as error:
            if not str(error).startswith("forward() "):  # an argument is unknown or missing
                raise
            names = ", ".join(f"`{node.target}`" for node in self.graph.find_nodes(op="placeholder"))
            raise TypeError(
                f"{error}. The arguments of this graph are {names}. Capture a call with the others, or call the "
                "original model."
            ) from None

    def __getattr__(self, name: str) -> Any:
        """Look up a parameter, buffer or module."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(
                f"{error}. It is a graph of one call, without other methods and attributes of the model. After "
                "transform(model, config, trace=True), the original model has the same layers and adapters: use it.",
                name=name,
                obj=self,
            ) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        """Copy the module."""
        made = super().__deepcopy__(memo)
        vars(made).update(copy.deepcopy(_tensors_of(vars(self)), memo))
        return made

    def __reduce__(self) -> Any:
        """Pickle it as fx does, by its code, and add the tensors that fx would convert."""
        return _unpickled, super().__reduce__()


def _tensors_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name in _KEPT or isinstance(value, Tensor)}


def _unpickled(make: Any, args: Any) -> fx.GraphModule:
    made: fx.GraphModule = make(*args)
    name = type(made).__name__
    made.__class__ = type(ModelGraph.__new__(ModelGraph))  # fx makes a class for each graph
    type(made).__name__ = name
    made.recompile()
    vars(made).update(_tensors_of(args[0]))
    return made


def graph_module(root: nn.Module, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> fx.GraphModule:
    """Create a GraphModule with the modules and parameters of `root`, with the same names in the same order.

    `modules` are those that the graph calls but `root` does not have.

    The order determines the name of a shared layer for a configuration, and the states of an optimizer. fx itself keeps
    only the modules that the graph uses, in the order of the graph. If the graph only reads the weight of a layer, fx
    replaces the layer with an empty module, without the adapters.
    """
    graph._tracer_cls = UnpicklingTracer
    module = ModelGraph(nn.Module(), fx.Graph(tracer_cls=UnpicklingTracer), type(root).__name__)
    for kind in ("_parameters", "_buffers", NON_PERSISTENT):
        vars(module)[kind] = copy.copy(vars(root)[kind])
    paths = {str(node.target) for node in graph.find_nodes(op="call_module")} - modules.keys()
    paths |= {str(node.target).rpartition(".")[0] for node in graph.find_nodes(op="get_attr")}
    used = {root.get_submodule(path) for path in paths}
    holders: dict[nn.Module, nn.Module] = {}
    vars(module)["_modules"] = {name: _holder(child, used, holders) for name, child in root._modules.items()}
    for name, part in modules.items():
        module.add_module(name, part.train(root.training))
    for node in graph.find_nodes(op="get_attr"):
        if not hasattr(module, name := str(node.target).partition(".")[0]):
            setattr(module, name, getattr(root, name))  # a tensor that is not a buffer
    module.training = root.training
    module.graph = graph
    for call in graph.find_nodes(op="call_module"):
        added = modules.get(str(call.target))
        if isinstance(added, ByMode) and call.users:
            _follow(added, module, module_path(next(iter(call.users))))
        elif isinstance(added, GraphOfMode):
            inner = [*added.in_train.graph.nodes, *added.in_eval.graph.nodes]
            around = [*map(_paths_around, inner)] if any(map(module_path, inner)) else [*map(_paths_around, call.users)]
            found = {path: attribute(module, path) for paths in around for path in paths if path}
            # A part is checked against these modules. It has the mode of the graph itself.
            vars(added)["followed"] = {path: part for path, part in found.items() if isinstance(part, nn.Module)}
    return module


def _follow(constant: ByMode, module: fx.GraphModule, path: str | None) -> None:
    """Make a constant follow the mode of the module that reads it, or of its innermost parent in the graph."""
    while path and not isinstance(attribute(module, path), nn.Module):
        path = path.rpartition(".")[0]
    vars(constant)["followed"] = attribute(module, path) if path else constant


def _holder(part: nn.Module | None, used: set[nn.Module], holders: dict[nn.Module, nn.Module]) -> nn.Module | None:
    """Return a part that the graph uses or that has tensors; otherwise, a new module with its children."""
    if part is None or part in used or part._parameters or part._buffers or not part._modules:
        return part
    if part not in holders:
        holder = holders[part] = nn.Module()
        holder.training = part.training
        vars(holder)["_modules"] = {name: _holder(child, used, holders) for name, child in part._modules.items()}
    return holders[part]


# --- captured graphs --------------------------------------------------------------------------------------------------


def attribute(owner: Any, path: Any) -> Any:
    """Look up an attribute by its dotted path; `None` if it does not exist."""
    return reduce(lambda part, name: getattr(part, name, None), str(path).split("."), owner)


class NestedGraph(nn.Module):
    """Calls an operator of `torch.export` that runs graphs."""

    def __init__(self, operator: str, bodies: Mapping[int, nn.Module]) -> None:
        """Store the name of the operator, and its graphs by their positions among the arguments."""
        super().__init__()
        self.operator = operator
        self.bodies = nn.ModuleDict({str(place): body for place, body in bodies.items()})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the operator with its graphs and all other arguments."""
        given: list[Any] = list(args)
        for place, body in self.bodies.items():
            given.insert(int(place), body)
        return getattr(torch.ops.higher_order, self.operator)(*given, **kwargs)

    def source(self) -> list[str]:
        """The name of the operator, and the code of its graphs."""
        return [self.operator, *(f"{place}: {body.code}" for place, body in self.bodies.items())]


def replace_node(node: fx.Node, op: str, target: Any, args: Any = (), kwargs: Any = None) -> fx.Node:
    """Replace a node with a new one that has its `meta`."""
    with node.graph.inserting_before(node):
        made = node.graph.create_node(op, target, args, kwargs)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
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


# --- the form of captured graphs --------------------------------------------------------------------------------------


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
    module, inputs, conditions = open_program(program, model)
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=CALL_LAYER):
        call = replace_node(node, "call_module", node.args[1], node.args[:1])
        copied = call.next
        if copied.target is torch.ops.aten.clone.default and list(call.users) == [copied]:
            copied.replace_all_uses_with(call)
            graph.erase_node(copied)
    constants = name_constants(graph, program, module)
    blocks = [block for part in constants.values() for block in part.modules() if isinstance(block, fx.GraphModule)]
    calls = [node for block in blocks for node in block.graph.find_nodes(op="call_function", target=CALL_LAYER)]
    if calls:
        raise InBlockError([str(node.args[1]) for node in calls])
    simplify(graph, inputs, model)
    constants = call_nested(graph, constants)
    for node in graph.find_nodes(op="get_attr", sort=True):
        min(node.users).prepend(node)
    # A symbol is a size that may change; the others are numbers and expressions.
    sizes = [found for size, found in _sizes(inputs).items() if size.isidentifier()]
    names = shown_names(program, argument_names(model, *call_of(program)))
    return Canonical(graph, constants, conditions, names, sizes)


def open_program(
    program: ExportedProgram, model: nn.Module | None = None
) -> tuple[fx.GraphModule, list[fx.Node], list[Condition]]:
    """The module of a program with a plain graph, the nodes of its flat inputs, and the conditions on them.

    The arguments have the names of those of `model`, by default of the module itself.
    """
    with exporting():  # torch cannot write the code of some programs, such as one with a layer called "in"
        module: fx.GraphModule = program.module(check_guards=False)
    names = argument_names(model or module, *call_of(program))
    module.graph.owning_module = None  # this module does not have layers to call
    inputs = nest(module.graph, program, names)
    return module, inputs, conditions_of(program, names, inputs)


def _sizes(inputs: list[fx.Node]) -> dict[str, list[tuple[int, int]]]:
    """Each size of the inputs -> (index of the input, dimension) of all inputs with this size."""
    found = defaultdict(list)
    for index, node in enumerate(inputs):
        for dimension, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            found[str(size)].append((index, dimension))
    return found


def simplify(graph: fx.Graph, inputs: list[fx.Node], model: nn.Module) -> None:
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


def name_constants(graph: fx.Graph, program: ExportedProgram, module: nn.Module) -> dict[str, nn.Module]:
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


def _paths_around(node: fx.Node) -> list[str]:
    """The paths of the modules whose forward was running when a node was recorded."""
    return [normalize_path(entry[0]) for entry in node.meta.get("nn_module_stack", {}).values()]


def module_path(node: fx.Node) -> str | None:
    """The path of the module whose forward contains a node, `""` for the root; `None` if this is unknown."""
    stack = node.meta.get("nn_module_stack")
    return normalize_path(list(stack.values())[-1][0]) if stack else None


def normalize_path(path: str) -> str:
    """Convert a path of `nn_module_stack` (`L['self']._modules['blocks'][0]`) to the form of `named_modules`."""
    path = path.replace("__dict__['_modules']", "")  # of a `ModelGraph`, in strict mode
    for before, after in (("L['self']", ""), ("._modules[", "["), ("['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(before, after)
    return path.strip(".")


def _hoist_sizes(graph: fx.Graph, inputs: list[fx.Node]) -> None:
    """Read each size of an input once, at the start of the graph, from the first input with this size."""
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
