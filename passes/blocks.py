"""Inline the blocks of a captured call that run without gradients, or with autocast disabled.

    with torch.no_grad():
        scale = x.abs().mean()          becomes          abs = x.abs();  mean = abs.mean();  scale = mean.detach()

`torch.export` records such a block as a graph of its own, whose layers the passes would not see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from hra_fx.compat import is_higher_order
from hra_fx.errors import CaptureError
from hra_fx.passes.nodes import attribute, line_of

#: Name of a block -> which of its arguments enables gradients or autocast, and which is its graph. The inputs follow.
_BLOCKS = {"wrap_with_set_grad_enabled": (0, 1), "wrap_with_autocast": (2, 4)}


def inline_blocks(module: fx.GraphModule) -> bool:
    """Inline the blocks of a program of `torch.export`, in place. Returns whether one of them disables autocast.

    If one does, the graph is not right under autocast.

    Raises:
        CaptureError: there is another block, such as one of `torch.cond`.
    """
    disables_autocast = False
    for block in [node for node in module.graph.nodes if is_higher_order(node.target)]:
        flag, place = _BLOCKS.get(str(block.target), (-1, -1))
        if block.args[flag] is not False:
            raise CaptureError(f"it runs a block of operators ({block.target}){_line(module, block)}")
        read, *inputs = block.args[place:]
        body: Any = attribute(module, read.target)
        disables_autocast |= inline_blocks(body) or str(block.target) == "wrap_with_autocast"
        copies = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
        with module.graph.inserting_before(block):
            results: Any = module.graph.graph_copy(body.graph, copies)
            for node in list(block.users):  # each takes one of the results
                result = results[node.args[1]]
                if str(block.target) == "wrap_with_set_grad_enabled" and isinstance(result.meta.get("val"), Tensor):
                    meta = result.meta
                    result = module.graph.call_function(torch.ops.aten.detach.default, (result,))
                    result.meta = dict(meta)
                node.replace_all_uses_with(result)
                module.graph.erase_node(node)
        for node in (block, read):
            module.graph.erase_node(node)
    return disables_autocast


def _line(module: fx.GraphModule, block: fx.Node) -> str:
    """The line of the model that runs a block, as a part of an error message."""
    bodies = [attribute(module, read.target) for read in block.all_input_nodes]
    inner = [node for body in bodies if isinstance(body, fx.GraphModule) for node in body.graph.nodes]
    return line_of(next((node for node in (block, *inner) if line_of(node)), block))
