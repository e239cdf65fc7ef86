"""Shapes and dtypes of the values of a graph for example inputs, without running it."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from hra_fx.compat import fake_tensor_mode
from hra_fx.errors import HRAWarning
from hra_fx.model.example_inputs import Call


def note_shapes(module: fx.GraphModule, call: Call) -> None:
    """Store the fake value of every node in `node.meta["val"]`.

    Warns:
        HRAWarning: the graph does not run on fake tensors (wrong inputs, or an operator without a fake kernel); then
            the graph is not changed.

    Args:
        module: the graph of the whole model by torch.fx; its placeholders are the arguments of the call.
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


def _inputs(module: fx.GraphModule, call: Call) -> tuple[Any, ...]:
    """One value for each placeholder.

    Raises:
        TypeError: the graph does not have these arguments.
    """
    args, kwargs = call
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())
