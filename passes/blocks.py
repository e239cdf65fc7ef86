"""Inline the blocks of a captured call that run without gradients or without autocast.

    with torch.no_grad():
        scale = x.abs().mean()          becomes          abs = x.abs();  mean = abs.mean();  scale = mean.detach()

`torch.export` records such a block as a graph of its own, whose layers the passes would not see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from hra_fx.compat import ENTER_AUTOCAST, EXIT_AUTOCAST, is_higher_order, schema_of
from hra_fx.errors import CaptureError
from hra_fx.passes.nodes import attribute, line_of

_ATEN: Any = torch.ops.aten
#: Operators that may return their input itself, which has a gradient if it is one of the block.
_SAME = (_ATEN.to, _ATEN.alias, _ATEN.type_as, _ATEN.contiguous, _ATEN.flatten, _ATEN.dropout)


def inline_blocks(module: fx.GraphModule) -> None:
    """Inline the blocks without gradients or without autocast of a program of `torch.export`, in place.

    Raises:
        CaptureError: a block without gradients writes into a tensor or may return its input, or there is another block,
            such as one of `torch.cond`.
    """
    for block in [node for node in module.graph.nodes if is_higher_order(node.target)]:
        name = str(block.target)
        is_autocast = name == "wrap_with_autocast" and block.args[2] is False  # an error in it would leave it enabled
        if not is_autocast and (name != "wrap_with_set_grad_enabled" or block.args[0] is not False):
            raise CaptureError(f"it runs a block of operators ({block.target}){_line(module, block)}")
        settings, (read, *inputs) = (block.args[:4], block.args[4:]) if is_autocast else ((), block.args[1:])
        body: Any = attribute(module, read.target)
        inline_blocks(body)
        if not is_autocast:
            _check(body.graph)
        copies = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
        with module.graph.inserting_before(block):
            entered = module.graph.call_function(ENTER_AUTOCAST, settings) if is_autocast else None
            results: Any = module.graph.graph_copy(body.graph, copies)
            if entered:
                module.graph.call_function(EXIT_AUTOCAST, (entered,))
            for node in list(block.users):  # each takes one of the results
                result = results[node.args[1]]
                if not is_autocast and result not in inputs and isinstance(result.meta.get("val"), Tensor):
                    meta = result.meta
                    result = module.graph.call_function(torch.ops.aten.detach.default, (result,))
                    result.meta = dict(meta)
                node.replace_all_uses_with(result)
                module.graph.erase_node(node)
        for node in (block, read):
            module.graph.erase_node(node)


def _check(body: fx.Graph) -> None:
    """Raise an error for what has a gradient outside of the block, or would have one inside of it."""
    for node in body.nodes:
        if getattr(schema_of(node.target), "is_mutable", False):
            raise CaptureError(f"it writes into a tensor without gradients{line_of(node)}")
    for result in body.output_node().all_input_nodes:
        node, value = result, result.meta.get("val")
        while getattr(node.target, "overloadpacket", None) in _SAME:
            node = node.all_input_nodes[0]
        if node is not result and node.op == "placeholder" and isinstance(value, Tensor) and value.is_floating_point():
            raise CaptureError(f"it may return an input of a block without gradients{line_of(result)}")


def _line(module: fx.GraphModule, block: fx.Node) -> str:
    """The line of the model that runs a block, as a part of an error message."""
    bodies = [attribute(module, read.target) for read in block.all_input_nodes]
    inner = [node for body in bodies if isinstance(body, fx.GraphModule) for node in body.graph.nodes]
    return line_of(next((node for node in (block, *inner) if line_of(node)), block))
