"""Graph mode, in the order of its steps: trace, match, insert, fold.

    graph = trace(model, layers, example)    trace.py     torch.fx; if it cannot, torch.export with layers as calls
    uses = match(graph, config)              match.py     target, exclude and layer patterns -> nodes
    insert(graph, uses)                      insert.py    y = layer(x)  ->  h = layer.hra_u(x);  y = layer(h, ...)
    fold(graph)                              fold.py      W <- W Q, and hra_u goes

`reflection.py` says what an adapter must have, so that these passes work with it. A pass changes a graph module in
place, ends with `lint` and `recompile`, and does nothing the second time. Nodes keep `val`, `nn_module_stack` and
`stack_trace`. The graph is the only record: a reflection is a node that calls `<layer>.hra_u`.

`trace` uses the other files: `capture`, `exported`, `blocks` and `canonical` for a graph of torch.export, `inputs` for
what it takes, `modes` for train and eval mode, `graph` for the module, and `compare`, `observed` and `other_calls` to
compare it with the model. `nodes` has helpers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from hra_fx.config import HRAConfig
from hra_fx.passes.fold import fold
from hra_fx.passes.insert import insert
from hra_fx.passes.match import match
from hra_fx.passes.reflection import Reflection
from hra_fx.passes.trace import trace
from hra_fx.selection.check import select_checked

__all__ = ["Reflection", "adapt", "fold", "insert", "match", "trace"]


def adapt(
    model: nn.Module,
    config: HRAConfig,
    attach: Callable[[nn.Module], object],
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
) -> fx.GraphModule:
    """Create a graph in which the layers that a configuration selects are adapted: `transform(..., trace=True)`.

    `attach` gives the layers their adapters. That of `transform` has done the last step, as for any `GraphModule`.
    """
    layers = list(select_checked(model, config).values())
    graph_module = trace(model, layers, example_inputs, dynamic_shapes, attach)
    attach(graph_module)
    return insert(graph_module, match(graph_module))
