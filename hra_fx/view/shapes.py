"""Shapes and dtypes of the values of a captured graph, for one example, without running it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from hra_fx.compat import fake_tensor_mode, pytree
from hra_fx.errors import HRAWarning
from hra_fx.model.example_inputs import Call


def note_shapes(module: fx.GraphModule, call: Call) -> None:
    """Leave in `node.meta["val"]` what every node would give; a graph that fake tensors cannot follow stays as it is.

    Warns:
        HRAWarning: they cannot, for the example does not fit, or an operator has no fake form; there are no shapes.

    Args:
        module: a whole graph of the call: one with its arguments as placeholders, or with the tensors in them.
        call: the example.
    """
    try:
        mode = fake_tensor_mode()
        with torch.no_grad():
            copied = _copy(module, mode)
            FakeTensorProp(copied, mode).propagate(*_inputs(module, call))
    except Exception as error:  # pictures do without shapes, and what runs on fake tensors is not ours alone
        why = str(error).strip().partition("\n")[0]
        text = (
            f"example_inputs: the graph does not run on them ({why}), so no shapes are told. Are they those of a call?"
        )
        warnings.warn(text, HRAWarning, stacklevel=2)
        return
    for node, noted in zip(module.graph.nodes, copied.graph.nodes, strict=True):
        if "val" in noted.meta:
            node.meta["val"] = noted.meta["val"]


def _copy(module: fx.GraphModule, mode: Any) -> fx.GraphModule:
    """A copy with fake tensors, for a forward may write into its buffers."""
    tensors = (*module.parameters(), *module.buffers())
    memo: dict[int, Any] = {id(tensor): mode.from_tensor(tensor) for tensor in tensors}
    # fx shares the tensors of a GraphModule's copy that its graph reads, unless they are known as copied.
    return copy.deepcopy(module, memo)


def _inputs(module: fx.GraphModule, call: Call) -> list[Any]:
    """One value for each placeholder: by position and name, where they are the arguments of the call."""
    args, kwargs = call
    placeholders = module.graph.find_nodes(op="placeholder")
    names = [str(node.target) for node in placeholders]
    if len(args) <= len(names) and set(kwargs) <= set(names[len(args) :]):
        defaults = [node.args[0] if node.args else None for node in placeholders]
        return [*args, *(kwargs.get(name, default) for name, default in zip(names, defaults, strict=True))][
            : len(names)
        ]
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
