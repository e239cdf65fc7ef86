"""What `match`, `insert` and `fold` require of an adapter: a child of the layer that reflects.

    layer(x)        calls  h = layer.hra_u(x)  itself, and is  layer(h, reflected=True)  or  layer(x, reflected=h)
    layer.weight    in a graph, is  layer.hra_u(weight=W)  if the graph reads it

HRA's child is `hra_u`. Another adapter, such as LoRA, works in graphs if its child and its layer follow this protocol,
and if its name is passed to the passes.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, fx

#: The name of the second argument of a layer: the result of its child, or `True` if this result is the input.
REFLECTED = "reflected"


class Reflection(Protocol):
    """The child of a layer with its adapter."""

    #: Whether a call of the layer calls the child with its input. Otherwise, the child only changes a weight.
    reflects_input: bool
    #: Whether the result is a new input, from which the layer computes as if it had no adapter.
    replaces_input: bool

    def __call__(self, x: Tensor | None = None, *factors: Any, weight: Tensor | None = None) -> Any:
        """Compute what the layer takes as input or as `reflected`; with `weight`, the weight that it uses instead.

        In a graph with the child `hra_factors`, `factors` is the result of this child.
        """

    def value_in_graph(self, x: Tensor, output: Tensor) -> Any:
        """A fake result for `node.meta["val"]`, from fake tensors of the layer's input and output."""


def is_rotated(reader: fx.Node, child: str) -> bool:
    """Whether a node computes the weight that a layer uses from the weight that it has."""
    return reader.op == "call_module" and str(reader.target).endswith(f".{child}") and "weight" in reader.kwargs
