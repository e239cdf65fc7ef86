r"""The two factors of a chain of reflections, `R` and `F`, for any number of layers in one autograd node.

A chain `U: (d, k)` acts on rows as `x Q^T = x + (x F^T) R`. With `D = diag(1 / |u|)` and `T` of
`hra_fx.functional.householder.compact_wy` for the unit vectors `U D`, both factors are one product:

    [R; F] = C U^T,    C = [D; -T D],    T^-1 = 1/2 + triu(D U^T U D, 1)

From gradients `dR` and `dF`, with `S = T^T dF` and `G` symmetric:

    G = triu(S R^T T^T, 1) + transposed,    B = dR - S + G R,    dU = [dR; dF]^T C + R^T (G - diag(B R^T)) D

Two products in the forward pass and three in the backward pass read the long dimension `d`. All others are of `(k, k)`
matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hra_fx import compat
from hra_fx.functional import householder

#: `R` and `F` of one layer, each `(k, d)`.
Factors: TypeAlias = tuple[Tensor, Tensor]


def wy_factors(vectors: Tensor, again: Callable[[], Tensor] | None = None) -> Tensor:
    """Compute the factors of chains `U: (..., d, k)`, which are at least float32: `R` and `F`, `(..., 2, k, d)`.

    The columns may have any length, and a zero column gives the identity. `again` computes the vectors again for
    another backward pass: the first one frees the saved tensors, and each of several passes may reach only some of the
    chains, for example for a model with several outputs.
    """
    with householder.without_autocast(vectors):
        if uses_plain_operators():
            return _plain_factors(vectors)
        factors: Tensor = _WYFactors.apply(vectors.reshape(-1, *vectors.shape[-2:]), again)  # type: ignore[no-untyped-call]
        return factors.view(*vectors.shape[:-2], *factors.shape[1:])


def uses_plain_operators() -> bool:
    """Whether factors are computed without autograd functions: for functorch, forward-mode and `torch.export`."""
    return compat.is_functorch_active() or compat.is_forward_ad_active() or compat.is_exporting()


def _plain_factors(vectors: Tensor) -> Tensor:
    """Compute the factors with differentiable operators, also for second derivatives."""
    chain = householder.normalize(vectors)
    if not compat.is_exporting():
        # The lengths are not constants, unlike in `householder.normalize`, because second derivatives depend on them.
        lengths = torch.linalg.vector_norm(chain, dim=-2, keepdim=True)
        chain = chain / torch.where(lengths > 0, lengths, 1.0)
    return torch.stack([chain.mT, -(householder.compact_wy(chain) @ chain.mT)], dim=-3)


class _WYFactors(torch.autograd.Function):
    """`U: (n, d, k) -> [R, F]: (n, 2, k, d)`."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, again: Callable[[], Tensor] | None) -> Tensor:
        values = _values(vectors)
        ctx.save_for_backward(vectors, *values)
        ctx.again = again
        return values[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gradient: Tensor
        if torch.is_grad_enabled():  # create_graph=True
            vectors = ctx.saved_tensors[0]
            own = vectors.view_as(vectors)
            (gradient,) = torch.autograd.grad(_plain_factors(own), own, grad, create_graph=True)
            return gradient, None
        factors, gram, scale, factor, coefficients = _saved_values(ctx)
        with householder.without_autocast(grad):
            rows, joint = factors[:, 0], grad.reshape(len(factors), -1, factors.shape[-1])
            rows_inner, down_inner = (joint @ rows.mT).to(gram.dtype).chunk(2, dim=1)
            through = factor.mT @ down_inner
            gram_grad = (through @ factor.mT).triu_(1)
            gram_grad = gram_grad + gram_grad.mT
            # The length of a vector does not change the result.
            along = (rows_inner - through + gram_grad @ gram).diagonal(dim1=1, dim2=2)
            inner = (gram_grad - torch.diag_embed(along)) * scale.unsqueeze(1)
            gradient = torch.baddbmm(joint.mT @ coefficients, rows.mT, inner.to(rows.dtype))
            return gradient, None


def _saved_values(ctx: Any) -> tuple[Tensor, ...]:
    """The values that the forward saved; they are computed again if a backward pass has freed them."""
    try:
        values: tuple[Tensor, ...] = ctx.saved_tensors[1:]
    except RuntimeError:
        if ctx.again is None:
            raise
        vectors = ctx.again()
        values = _values(vectors.reshape(-1, *vectors.shape[-2:]))
    return values


def _values(vectors: Tensor) -> tuple[Tensor, ...]:
    """The factors of `vectors: (n, d, k)`, and the values that their gradient needs."""
    # Use float64, because squares of float32 can overflow, and TF32 (if enabled) is not accurate enough for `T`.
    wide = vectors if vectors.device.type == "mps" else vectors.double()
    gram = wide.mT @ wide
    squares = gram.diagonal(dim1=1, dim2=2)
    scale = squares.masked_fill(squares == 0, 1.0).rsqrt_()
    gram = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
    inverse = gram.triu(1)
    inverse.diagonal(dim1=1, dim2=2).fill_(0.5)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    factor = torch.linalg.solve_triangular(inverse, identity, upper=True)
    coefficients = (torch.cat([identity, factor.neg()], dim=1) * scale.unsqueeze(1)).to(vectors.dtype)
    factors = (coefficients @ vectors.mT).view(-1, 2, vectors.shape[2], vectors.shape[1])
    return factors, gram, scale, factor, coefficients
