"""Inline the blocks of a captured call that run without gradients.

    with torch.no_grad():
        scale = x.abs().mean()          becomes          abs = x.abs();  mean = abs.mean();  scale = mean.detach()

`torch.export` records such a block as a graph of its own, whose layers the passes would not see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from hra_fx.compat import is_higher_order, schema_of
from hra_fx.errors import CaptureError
from hra_fx.passes.nodes import attribute, line_of

_ATEN: Any = torch.ops.aten
#: Operators that may return their input itself, which has a gradient if it is one of the block.
_SAME = (_ATEN.to, _ATEN.alias, _ATEN.type_as, _ATEN.contiguous, _ATEN.flatten, _ATEN.dropout)


def inline_blocks(module: fx.GraphModule) -> None:
    """Inline the blocks without gradients of a program of `torch.export`, in place.

    Raises:
        CaptureError: such a block writes into a tensor or may return its input, or there is another block, such as one
            of `torch.cond`.
    """
    for block in [node for node in module.graph.nodes if is_higher_order(node.target)]:
        if str(block.target) != "wrap_with_set_grad_enabled" or block.args[0] is not False:
            raise CaptureError(f"it runs a block of operators ({block.target}){_line(module, block)}")
        _, read, *inputs = block.args
        body: Any = attribute(module, read.target)
        inline_blocks(body)
        _check(body.graph)
        copies = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
        with module.graph.inserting_before(block):
            results: Any = module.graph.graph_copy(body.graph, copies)
            for node in list(block.users):  # each takes one of the results
                result = results[node.args[1]]
                if result not in inputs and isinstance(result.meta.get("val"), Tensor):
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
