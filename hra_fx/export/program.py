"""Recognize exported programs and their graphs, which cannot be adapted."""

from __future__ import annotations

from torch import fx

from hra_fx.compat import OpOverload, is_higher_order, loaded_class
from hra_fx.errors import AdapterError
from hra_fx.layers.target import find_kind


def is_program(value: object) -> bool:
    """Whether a value is a `torch.export.ExportedProgram`. This does not import torch.export."""
    return isinstance(value, loaded_class("torch.export", "ExportedProgram"))


def refuse_operators(model: object) -> None:
    """Raise an error for a program, or a `GraphModule` of ATen operators that read parameters, without layer calls."""
    if is_program(model) or (isinstance(model, fx.GraphModule) and _consists_of_operators(model)):
        raise AdapterError(
            f"`model` is {'an ExportedProgram' if is_program(model) else 'a GraphModule'} of operators, without calls "
            "of layers. Adapt the model before torch.export: hra_fx.transform(model, config)."
        )


def _consists_of_operators(value: fx.GraphModule) -> bool:
    called = (value.get_submodule(str(node.target)) for node in value.graph.find_nodes(op="call_module"))
    if any(find_kind(part) for part in called):
        return False
    parameters = dict(value.named_parameters(remove_duplicate=False))
    nodes = [node for node in value.graph.find_nodes(op="get_attr") if node.target in parameters]
    users = [user.target for node in nodes for user in node.users]
    # All layers may be in nested graphs, for example under torch.autocast.
    return any(isinstance(target, OpOverload) or is_higher_order(target) for target in users)
