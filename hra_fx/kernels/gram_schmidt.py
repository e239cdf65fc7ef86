"""Gram-Schmidt as one node: an orthonormal basis of the vectors, by Householder QR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.kernels.dispatch import applies
from hra_fx.kernels.prefetch import announce, ready
from hra_fx.kernels.wy_factor import factors_of


def orthonormal_chain(vectors: Tensor, anchor: Tensor | None) -> Tensor:
    """The chain `[A | V]`, with `V` of `hra_fx.functional.householder.orthonormalize`.

    Args:
        vectors: `U: (d, r)` with `r <= d`, of full column rank.
        anchor: `A: (d, a)`, frozen, if there is one.

    Returns:
        `(d, a + r)` with `V^T V = I`, float32 or wider, also under autocast.

    Example:
        >>> orthonormal_chain(torch.tensor([[3.0, 1.0], [0.0, 2.0]]), None)
        tensor([[1., 0.],
                [0., 1.]])
    """
    fits = vectors.requires_grad and (anchor is None or not anchor.requires_grad)
    if not fits or not applies(vectors, *(() if anchor is None else (anchor,))):
        basis = householder.orthonormalize(vectors)
        return basis if anchor is None else torch.cat([anchor.to(basis.dtype), basis], dim=1)
    with householder.without_autocast(vectors):
        wide = vectors.to(householder.working_dtype(vectors.dtype))
        made = ready(decomposed, wide) if anchor is None else ready(decomposed, wide, anchor)
        chain: Tensor = _Chain.apply(wide, made.chain, made.triangle)  # type: ignore[no-untyped-call]
        if made.factor is not None:
            announce(factors_of, chain, made.factor)
    return chain


class Decomposed(NamedTuple):
    """`[A | V]: (d, a + r)` and `R: (r, r)` of `U = V R`, and the factor of that chain, if products can bear it."""

    chain: Tensor
    triangle: Tensor
    factor: Tensor | None


def decomposed(many: Sequence[tuple[Tensor, ...]]) -> list[Decomposed]:
    """What belongs to each `(U,)` or `(U, A)`, alike in shape and dtype; constants to autograd."""
    with torch.no_grad():
        found = [householder.positive_qr(vectors) for vectors, *_ in many]
        anchors = [[anchor.to(vectors.dtype) for anchor in rest] for vectors, *rest in many]
        # Without an anchor it keeps its layout, and so gives the same numbers as a frozen one.
        both = zip(anchors, found, strict=True)
        chains = [torch.cat([*rest, basis], dim=1) if rest else basis for rest, (basis, _) in both]
        factors = factors_of([(chain,) for chain in chains]) if chains[0].is_cpu else [None] * len(chains)
    return [Decomposed(chain, R, factor) for chain, (_, R), factor in zip(chains, found, factors, strict=True)]


class _Chain(torch.autograd.Function):
    """`(U, [A | V], R) -> [A | V]`, where `V` and `R` are those of `U`."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, chain: Tensor, triangle: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, chain, triangle)
        return chain.detach()  # of this node, as often as it is made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        vectors, chain, triangle = ctx.saved_tensors
        made, gradient = (one[:, -vectors.shape[1] :] for one in (chain, gradient))
        with householder.without_autocast(vectors):
            if torch.is_grad_enabled():  # there may be a gradient of the gradient
                return _plain_gradient(vectors, gradient), None, None
            return householder.qr_gradient(gradient, made, triangle), None, None


def _plain_gradient(vectors: Tensor, gradient: Tensor) -> Tensor:
    """That of the QR of PyTorch, which can be differentiated again."""
    own = vectors.view_as(vectors)
    (found,) = torch.autograd.grad(householder.positive_qr(own)[0], own, gradient, create_graph=True)
    return found
