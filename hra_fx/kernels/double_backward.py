"""Gradients that can be differentiated again, from the plain formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hra_fx.functional import householder


def differentiable_gradients(
    needed: Sequence[bool], x: Tensor, chain: Tensor, grad: Tensor, then: Callable[[Tensor], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `then(x Q^T)` with respect to `x` and `U`, with a graph.

    Args:
        needed: which of the two are needed.
        x: `(..., d)`.
        chain: `U: (d, k)`.
        grad: the gradient of the result.
        then: the rest of the forward, applied to the reflected rows.
    """
    # Views, because `x` can depend on the same vectors, as in a layer that is called twice.
    inputs = x.view_as(x), chain.view_as(chain)
    output = then(householder.reflect(inputs[0], inputs[1], householder.compact_wy(inputs[1])))
    wanted = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
    gradients = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return next(gradients) if needed[0] else None, next(gradients) if needed[1] else None
