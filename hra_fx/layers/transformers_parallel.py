"""Layers that transformers has split (`tp_plan`): their `forward` is an attribute that calls the method of the class.

transformers sets it before an adapter can be added, and it holds the method of the class of that time. The adapted
class takes its place there. Without gradients, transformers calls it with local tensors in place of `DTensor`s.
"""

from __future__ import annotations

from types import CellType
from typing import Any

from torch import nn

from hra_fx.kernels.distributed import as_dtensor
from hra_fx.layers.sharding import is_dtensor
from hra_fx.layers.target import REFLECTION

_MODULE = "transformers.distributed.tensor_parallel"
_STYLES = ("ColwiseParallel", "RowwiseParallel")


def parallel_forward(layer: nn.Module) -> dict[str, CellType] | None:
    """The variables of the `forward` that transformers set on a layer, by name.

    `None` if the layer does not have such a forward, or if its style is not column-wise or row-wise.
    """
    forward: Any = vars(layer).get("forward")
    if getattr(forward, "__module__", None) != _MODULE or not getattr(forward, "__closure__", None):
        return None
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True))
    known = {"original_forward", "mesh", "self"} <= cells.keys()
    return cells if known and type(cells["self"].cell_contents).__name__ in _STYLES else None


def call_adapted_class(layer: nn.Module) -> None:
    """Let the `forward` that transformers set on a layer call its present class; without one, do nothing."""
    cells = parallel_forward(layer)
    if cells is None:
        return
    from torch.distributed.tensor import Shard

    mesh = cells["mesh"].cell_contents

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        adapters: Any = layer._modules.get(REFLECTION)
        if adapters is None or is_dtensor(x) or x.shape[-1] == adapters.width:
            return type(layer).forward(layer, x, *args, **kwargs)
        whole = as_dtensor(x, mesh, [Shard(x.dim() - 1)], (*x.shape[:-1], adapters.width))
        return type(layer).forward(layer, x, adapters(whole).to_local())

    cells["original_forward"].cell_contents = forward
