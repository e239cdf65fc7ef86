"""Gradients that can be differentiated again: those of the plain formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hra_fx.functional import householder


def plain_gradients(
    wanted: Sequence[bool], x: Tensor, chain: Tensor, gradient: Tensor, then: Callable[[Tensor], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `then(x Q^T)` by `x` and by `U`, as a graph.

    Args:
        wanted: which of the two are asked for.
        x: `(..., d)`.
        chain: `U: (d, k)`.
        gradient: that of the result.
        then: what becomes of the reflected rows.
    """
    # Aliases, for `x` may have been made of the same vectors, as where a layer is called twice.
    own = x.view_as(x), chain.view_as(chain)
    output = then(householder.reflect(own[0], own[1], householder.compact_wy(own[1])))
    asked = [tensor for tensor, needed in zip(own, wanted, strict=True) if needed]
    found = iter(torch.autograd.grad(output, asked, gradient, create_graph=True))
    return next(found) if wanted[0] else None, next(found) if wanted[1] else None
