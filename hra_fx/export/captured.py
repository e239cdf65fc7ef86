"""`transform` and `fold`, in place, of a captured `fx.GraphModule` of ATen operators, such as `program.module()`.

The graph reads parameters by `get_attr`. They are replaced by new ones on the
same memory, so the program and the model that they come from do not change.
"""

from __future__ import annotations

from typing import TypeVar

from torch import fx

from hra_fx.compat import OpOverload
from hra_fx.config import HRAConfig
from hra_fx.export.metadata import has_adapter
from hra_fx.export.module_edit import ModuleEditor, weight_nodes
from hra_fx.export.rewrite import add_reflections, fold_reflections
from hra_fx.layers.adapters import check_adapter_name

G = TypeVar("G", bound=fx.GraphModule)


def is_captured(value: object) -> bool:
    """Whether a value is a `GraphModule` of ATen operators that read parameters, without calls of layers.

    Example:
        >>> from torch import nn
        >>> is_captured(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))))
        False
        >>> is_captured(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)).module())
        True
    """
    return isinstance(value, fx.GraphModule) and any(
        isinstance(user.target, OpOverload) for node in weight_nodes(value) for user in node.users
    )


def transform_captured(module: G, config: HRAConfig, adapter_name: str = "default") -> G:
    """Add reflections to a captured graph, in place: each selected weight is replaced by `W Q`.

    The `state_dict` gains the keys of `transform_program`. The parameters are new objects on the same memory, frozen.

    Args:
        module: a graph of ATen operators, with the parameter names of the model that was captured.
        config: which layers, how many reflections, and the initialization.
        adapter_name: name of the adapter, part of its parameters' names.

    Returns:
        `module`.

    Raises:
        ConfigError: the configuration trains more than reflections.
        SelectionError: the configuration does not fit the graph.
        UnsupportedLayerError: a selected layer does not support reflections.
        AdapterError: the graph has another adapter. After any error the module is unchanged.

    Example:
        >>> from torch import nn
        >>> module = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),)).module()
        >>> module = transform_captured(module, HRAConfig(r=2, target_modules=["0"]))
        >>> [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        ['0.hra_u.default']
    """
    check_adapter_name(adapter_name)
    if has_adapter(module, config, adapter_name):
        return module
    add_reflections(ModuleEditor(module), config, adapter_name)
    _move_before_users(module.graph)
    module.recompile()
    return module


def fold_captured(module: G) -> G:
    """Fold the reflections of a captured graph into its weights, in place; the folded weights are new tensors.

    Args:
        module: a graph of `transform_captured`, or the module of a program of `transform_program`.

    Returns:
        `module`.

    Raises:
        AdapterError: the graph has no reflections.
        FoldError: a folded weight would not be finite. The module is unchanged.

    Example:
        >>> from torch import nn
        >>> module = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),)).module()
        >>> list(fold_captured(transform_captured(module, HRAConfig(r=2, target_modules=["0"]))).state_dict())
        ['0.weight', '0.bias']
    """
    fold_reflections(ModuleEditor(module))
    module.recompile()
    return module


def _move_before_users(graph: fx.Graph) -> None:
    """Move each `get_attr` node before its first user, which may have read another node before."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="get_attr"):
        first = min(node.users, key=order.__getitem__, default=node)
        if order[first] < order[node]:
            first.prepend(node)
