"""Shapes and dtypes of the values of a graph for example inputs, without running it."""

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
    """Store the fake value of every node in `node.meta["val"]`.

    Warns:
        HRAWarning: the graph does not run on fake tensors (wrong inputs, or an operator without a fake kernel); then
            the graph is not changed.

    Args:
        module: a whole graph of the call. Its placeholders are the arguments, or the tensors in them.
        call: the example inputs.
    """
    try:
        mode = fake_tensor_mode()
        with torch.no_grad():
            copied = _copy(module, mode)
            FakeTensorProp(copied, mode).propagate(*_inputs(module, call))
    except Exception as error:  # shapes are optional, and any operator of the model may fail on fake tensors
        why = str(error).strip().partition("\n")[0]
        text = f"The graph does not run on `example_inputs` ({why}), so the picture has no shapes. Check the inputs."
        warnings.warn(text, HRAWarning, stacklevel=2)
        return
    for node, noted in zip(module.graph.nodes, copied.graph.nodes, strict=True):
        if "val" in noted.meta:
            node.meta["val"] = noted.meta["val"]


def _copy(module: fx.GraphModule, mode: Any) -> fx.GraphModule:
    """A copy with fake tensors, because a forward may write into its buffers."""
    tensors = (*module.parameters(), *module.buffers())
    memo: dict[int, Any] = {id(tensor): mode.from_tensor(tensor) for tensor in tensors}
    # A copied GraphModule shares the tensors that its graph reads, unless they are in the memo.
    return copy.deepcopy(module, memo)


def _inputs(module: fx.GraphModule, call: Call) -> list[Any]:
    """One value for each placeholder: by position and name if they are the arguments of the call."""
    args, kwargs = call
    placeholders = module.graph.find_nodes(op="placeholder")
    names = [str(node.target) for node in placeholders]
    if len(args) <= len(names) and set(kwargs) <= set(names[len(args) :]):
        defaults = [node.args[0] if node.args else None for node in placeholders]
        return [*args, *(kwargs.get(name, default) for name, default in zip(names, defaults, strict=True))][
            : len(names)
        ]
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
