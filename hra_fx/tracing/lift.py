"""A recorded graph as one of the model: its parameters by name, its inputs and outputs in order, its sites marked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from hra_fx.compat import pytree
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.class_swap import unwrap_class
from hra_fx.model.example_inputs import Call
from hra_fx.tracing.record import ONE_NODE, Recorded, outputs


@dataclass(frozen=True)
class Names:
    """What the things of a model are called in it, and where they are.

    Attributes:
        tensors: id of a parameter or buffer -> its name, the first where it has several.
        modules: id of a module -> its path, likewise; without the reflections.
    """

    tensors: Mapping[int, str]
    modules: Mapping[int, str]


def names_in(model: nn.Module) -> Names:
    """The names of everything in a model."""
    named = (*model.named_parameters(), *model.named_buffers())
    modules = ((path, part) for path, part in model.named_modules() if not isinstance(part, HouseholderAdapters))
    return Names({id(tensor): name for name, tensor in named}, {id(part): path for path, part in modules})


def lift(recorded: Recorded, model: nn.Module, names: Names, call: Call | None = None) -> fx.GraphModule:
    """The graph over the parameters and buffers of a model.

    Args:
        recorded: what was recorded; it is used up.
        model: the one whose tensors the graph is to share.
        names: those in the model that ran.
        call: what it was called with, if the graph is that of a whole call: then its inputs are the tensors in there,
            each once, and other tensors from outside (attributes that are not buffers) become buffers of the graph.
    """
    graph, attributes = recorded.graph, dict(recorded.owned)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    placeholders = graph.find_nodes(op="placeholder")
    given = {} if call is None else _add_inputs(graph, call)
    for node, value in zip(placeholders, recorded.values, strict=True):
        name = names.tensors.get(id(value))
        if name is not None:
            attributes[name] = own[name]
            _replace(graph, node, name)
        elif id(value) in given:
            node.replace_all_uses_with(given[id(value)])
            graph.erase_node(node)
        elif call is not None and isinstance(value, Tensor):
            name = str(node.target).strip("_")
            attributes[name] = value
            _replace(graph, node, name)
    if call is not None:
        _name_outputs(graph)
    _clean(graph, names)
    module = fx.GraphModule(attributes, graph, unwrap_class(type(model)).__name__)
    module.training = model.training
    return module


def _replace(graph: fx.Graph, node: fx.Node, name: str) -> None:
    """Read an attribute in place of a placeholder."""
    with graph.inserting_before(node):
        node.replace_all_uses_with(graph.get_attr(name))
    graph.erase_node(node)


def _add_inputs(graph: fx.Graph, call: Call) -> dict[int, fx.Node]:
    """A placeholder for each tensor in a call, in its order; id of the tensor -> the first that it has."""
    args, kwargs = call
    leaves, _ = pytree.tree_flatten_with_path({**{f"args_{i}": value for i, value in enumerate(args)}, **kwargs})
    found: dict[int, fx.Node] = {}
    first = next(iter(graph.nodes))
    for path, value in leaves:
        if isinstance(value, Tensor):
            name = re.sub(r"\W+", "_", pytree.keystr(path)).strip("_")
            with graph.inserting_before(first):
                node = graph.placeholder(name)
            found.setdefault(id(value), node)
    return found


def _name_outputs(graph: fx.Graph) -> None:
    """Have the graph give what the node `outputs` names, and nothing else."""
    (named,) = graph.find_nodes(op="call_function", target=outputs)
    (last,) = graph.find_nodes(op="output")
    last.args = (tuple(named.args),)
    for user in list(named.users):
        graph.erase_node(user)
    graph.erase_node(named)


def _clean(graph: fx.Graph, names: Names) -> None:
    """Drop unused shapes and rotated weights, and keep of `node.meta` what outlives the recording, with fx's paths."""
    for node in reversed(graph.nodes):
        # A look at the dtype of a weight, say, leaves an unused `W Q`.
        if node.target in (getattr, *ONE_NODE) and not node.users:
            graph.erase_node(node)
            continue
        stack = node.meta.get("nn_module_stack") or {}
        paths = {names.modules.get(_number(key)): kind for key, (_, kind) in stack.items()}
        kept = {key: node.meta[key] for key in ("stack_trace",) if key in node.meta}
        if places := {path: (path, unwrap_class(kind)) for path, kind in paths.items() if path}:
            kept["nn_module_stack"] = places
        if node.target in ONE_NODE:
            # What fx's tracer writes for a function that it does not go into: it holds for one that reads this graph.
            kept["is_wrapped"] = True
        node.meta = kept


def _number(key: Any) -> int:
    """The id of the module that an entry of TorchDynamo's module stack is about."""
    digits = re.match(r"\d+", str(key))
    return int(digits.group()) if digits else -1
