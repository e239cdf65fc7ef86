"""Make a GraphModule that shares the modules and parameters of another module.

Blocks with a graph of their own, such as one under `torch.no_grad`, become modules of a captured graph: fx unpickles a
graph by tracing its code, which would inline such a graph without its context, but modules stay calls.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import fx, nn

from hra_fx.compat import NON_PERSISTENT, is_higher_order, non_persistent_buffers
from hra_fx.errors import CaptureError
from hra_fx.tracing.trace import Traced


def graph_module(root: nn.Module, traced: Traced) -> fx.GraphModule:
    """A GraphModule with the modules and parameters of `root`, under the same names.

    Where a graph reads only the weight of a layer, fx would hold it in an empty module, without the adapters.
    """
    holder = nn.Module()
    holder.__dict__.update({**vars(root), "_modules": {**root._modules, **traced.modules}})
    module = fx.GraphModule(holder, traced.graph, type(root).__name__)
    for node in traced.graph.find_nodes(op="get_attr"):
        path = str(node.target).rpartition(".")[0]
        if path:
            module.set_submodule(path, holder.get_submodule(path))
    _keep_unused(module, root)
    _restore_order(module, root)
    shared = set(root.modules())
    for part in module.modules():  # a part of the model may be frozen in eval mode
        if part not in shared:
            part.training = root.training
    return module


def _keep_unused(module: fx.GraphModule, root: nn.Module) -> None:
    """Add the tensors that the graph does not use, so that the `state_dict` has the same keys."""
    for kind in ("_parameters", "_buffers"):
        missing = {name: value for name, value in vars(root)[kind].items() if name not in vars(module)[kind]}
        vars(module)[kind].update(missing)
    for name in non_persistent_buffers(root):
        module.register_buffer(name, module._buffers[name], persistent=False)
    present = dict(module.named_modules(remove_duplicate=False))
    for path, part in root.named_modules(remove_duplicate=False):
        if path and (part._parameters or part._buffers) and present.get(path) is not part:
            module.add_submodule(path, part)
            present.update(part.named_modules(prefix=path, remove_duplicate=False))


def _restore_order(module: fx.GraphModule, root: nn.Module) -> None:
    """Put modules and parameters in the order of `root`, not of the graph.

    The first path of a shared module depends on the order, and with it the name by which a configuration selects it; so
    do the states of an optimizer.
    """
    originals = dict(root.named_modules(remove_duplicate=False))
    for path, own in list(module.named_modules()):
        original = originals.get(path, own)
        for kind in ("_modules", "_parameters", "_buffers") if original is not own else ():
            held, wanted = vars(own)[kind], vars(original)[kind]
            ordered = {name: held[name] for name in (*(name for name in wanted if name in held), *held)}
            held.clear()
            held.update(ordered)


# --- captured graphs --------------------------------------------------------------------------------------------------


def attribute(owner: Any, path: Any) -> Any:
    """An attribute by its dotted path, `None` if there is none.

    Example:
        >>> attribute(nn.Sequential(nn.Linear(2, 3)), "0.weight").shape, attribute(nn.Identity(), "0.weight")
        (torch.Size([3, 2]), None)
    """
    return reduce(lambda part, name: getattr(part, name, None), str(path).split("."), owner)


#: The attributes of a module that a view changes.
_OWN = ("_buffers", "_modules", NON_PERSISTENT)


def with_parts(model: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A view of a model, over the same modules and tensors, with more modules."""
    view = nn.Module()
    vars(view).update({name: copy.copy(value) if name in _OWN else value for name, value in vars(model).items()})
    view.__class__ = type(type(model).__name__, (nn.Module,), {})
    for name, value in parts.items():
        if hasattr(model, name):
            raise CaptureError(f"its attribute {name!r} has a name that a graph uses for itself. Rename it")
        view.add_module(name, value)
    return view


class NestedGraph(nn.Module):
    """Calls an operator of `torch.export` that runs graphs.

    Example:
        >>> double = fx.symbolic_trace(nn.Identity())
        >>> block = NestedGraph("wrap_with_set_grad_enabled", {1: double})
        >>> block(False, torch.ones(1, requires_grad=True)).requires_grad
        True
    """

    def __init__(self, operator: str, bodies: Mapping[int, nn.Module]) -> None:
        """Store the name of the operator, and its graphs by their places among its arguments."""
        super().__init__()
        self.operator = operator
        self.bodies = nn.ModuleDict({str(place): body for place, body in bodies.items()})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the operator with its graphs and all other arguments."""
        given: list[Any] = list(args)
        for place, body in self.bodies.items():
            given.insert(int(place), body)
        return getattr(torch.ops.higher_order, self.operator)(*given, **kwargs)


def captured_module(model: nn.Module, parts: Mapping[str, nn.Module], traced: Traced) -> fx.GraphModule:
    """A GraphModule of a captured graph, over the modules and tensors of a model.

    Args:
        model: the model.
        parts: more modules, and nested graphs.
        traced: the graph, which is changed.
    """
    root = with_parts(model, parts)
    _call_nested(traced.graph, root)
    return graph_module(root, traced)


def _call_nested(graph: fx.Graph, owner: nn.Module) -> None:
    for number, node in enumerate([node for node in graph.nodes if is_higher_order(node.target)]):
        reads = {place: arg for place, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr"}
        bodies = {place: attribute(owner, read.target) for place, read in reads.items()}
        bodies = {place: body for place, body in bodies.items() if isinstance(body, fx.GraphModule)}
        for body in bodies.values():
            _call_nested(body.graph, body)
            body.recompile()
        name = f"nested_{number}"
        owner.add_module(name, NestedGraph(str(node.target), bodies))
        with graph.inserting_before(node):
            call = graph.call_module(name, tuple(arg for place, arg in enumerate(node.args) if place not in bodies))
        call.kwargs, call.meta = node.kwargs, dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        for read in reads.values():
            if not read.users:
                graph.erase_node(read)
