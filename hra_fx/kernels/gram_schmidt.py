"""Gram-Schmidt by Householder QR as one autograd node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.kernels.dispatch import can_use_autograd_function
from hra_fx.kernels.prefetch import get_or_compute, publish
from hra_fx.kernels.wy_factor import compute_factors


def orthonormal_chain(vectors: Tensor, anchor: Tensor | None) -> Tensor:
    """The chain `[A | V]`, with `V` of `hra_fx.functional.householder.orthonormalize`.

    Args:
        vectors: `U: (d, r)` with `r <= d`, of full column rank.
        anchor: `A: (d, a)`, frozen, or `None`.

    Returns:
        `(d, a + r)` with `V^T V = I`, at least float32, also under autocast.

    Example:
        >>> orthonormal_chain(torch.tensor([[3.0, 1.0], [0.0, 2.0]]), None)
        tensor([[1., 0.],
                [0., 1.]])
    """
    supported = vectors.requires_grad and (anchor is None or not anchor.requires_grad)
    if not supported or not can_use_autograd_function(vectors, *(() if anchor is None else (anchor,))):
        basis = householder.orthonormalize(vectors)
        return basis if anchor is None else torch.cat([anchor.to(basis.dtype), basis], dim=1)
    with householder.without_autocast(vectors):
        wide = vectors.to(householder.working_dtype(vectors.dtype))
        qr = get_or_compute(compute_qr, wide) if anchor is None else get_or_compute(compute_qr, wide, anchor)
        chain: Tensor = _Chain.apply(wide, qr.chain, qr.triangle)  # type: ignore[no-untyped-call]
        if qr.factor is not None:
            publish(compute_factors, chain, qr.factor)
    return chain


class QRChain(NamedTuple):
    """`[A | V]: (d, a + r)`, `R: (r, r)` of `U = V R`, and `T` of the chain, or `None` as in `compute_factors`."""

    chain: Tensor
    triangle: Tensor
    factor: Tensor | None


def compute_qr(sources: Sequence[tuple[Tensor, ...]]) -> list[QRChain]:
    """The QR of each `(U,)` or `(U, A)`, all of one shape and dtype; constants to autograd."""
    with torch.no_grad():
        qrs = [householder.positive_qr(vectors) for vectors, *_ in sources]
        anchors = [[anchor.to(vectors.dtype) for anchor in rest] for vectors, *rest in sources]
        # Without an anchor the layout is kept, so that trained and frozen adapters give the same bits.
        pairs = zip(anchors, qrs, strict=True)
        chains = [torch.cat([*rest, basis], dim=1) if rest else basis for rest, (basis, _) in pairs]
        factors = compute_factors([(chain,) for chain in chains]) if chains[0].is_cpu else [None] * len(chains)
    return [QRChain(chain, R, factor) for chain, (_, R), factor in zip(chains, qrs, factors, strict=True)]


class _Chain(torch.autograd.Function):
    """`(U, [A | V], R) -> [A | V]`, where `V` and `R` are the QR of `U`."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, chain: Tensor, triangle: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, chain, triangle)
        return chain.detach()  # a new tensor for each call of this node

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        vectors, chain, triangle = ctx.saved_tensors
        basis, grad = (tensor[:, -vectors.shape[1] :] for tensor in (chain, grad))
        with householder.without_autocast(vectors):
            if torch.is_grad_enabled():  # create_graph=True
                return _differentiable_gradient(vectors, grad), None, None
            return householder.qr_gradient(grad, basis, triangle), None, None


def _differentiable_gradient(vectors: Tensor, grad: Tensor) -> Tensor:
    """The gradient of PyTorch's QR, which can be differentiated again."""
    own = vectors.view_as(vectors)
    (gradient,) = torch.autograd.grad(householder.positive_qr(own)[0], own, grad, create_graph=True)
    return gradient
