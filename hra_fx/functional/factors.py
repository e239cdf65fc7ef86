r"""The two factors of a chain of reflections, `R` and `F`, for any number of layers in one autograd node.

A chain `U: (d, k)` acts on rows as `x Q^T = x + (x F^T) R`. With `D = diag(1 / |u|)` and `T` of
`hra_fx.functional.householder.compact_wy` for the unit vectors `U D`, both factors are one product:

    [R; F] = C U^T,    C = [D; -T D],    T^-1 = 1/2 + triu(D U^T U D, 1)

From gradients `dR` and `dF`, with `S = T^T dF` and `G` symmetric:

    G = triu(S R^T T^T, 1) + transposed,    B = dR - S + G R,    dU = [dR; dF]^T C + R^T (G - diag(B R^T)) D

Two products in the forward pass and three in the backward pass read the long dimension `d`. All others are of `(k, k)`
matrices. In a batch, the factors of all layers take the same number of operators as those of one layer. TorchDynamo
records the batch as one operator, which AOTAutograd decomposes:

    hra_fx::batched_factors(tensors[], forms[], dtype) -> Tensor[]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from hra_fx import compat
from hra_fx.compat import is_compiling
from hra_fx.functional import householder
from hra_fx.functional.chain import GRAM_SCHMIDT, KEPT, PAIRS, chain_of, gradient_of

#: `R` and `F` of one layer, each `(k, d)`.
Factors: TypeAlias = tuple[Tensor, Tensor]


def batched_factors(tensors: list[Tensor], forms: list[int], dtype: torch.dtype) -> list[Factors]:
    """Compute the factors of several layers whose chains have the same form, in at least float32.

    A zero column gives the identity. In the backward pass, a layer with unused factors does not get a gradient, because
    an optimizer changes parameters with a zero gradient (by their momentum), but not parameters without one.

    Args:
        tensors: the parameters of the first part of the chain of each layer, then their kept directions, if they have
            any; then those of the second part, and so on.
        forms: the form of each part (`hra_fx.functional.chain.vectors_of`).
        dtype: the dtype of the result.

    Returns:
        `R` and `F: (k, d)` of each layer.

    Example:
        >>> vectors = torch.tensor([[3.0], [0.0]])
        >>> [(rows, down)] = batched_factors([vectors], [0], torch.float32)
        >>> torch.eye(2) + down.T @ rows
        tensor([[-1.,  0.],
                [ 0.,  1.]])
    """
    compute = torch.ops.hra_fx.batched_factors.default if is_dynamo_compiling() and is_compiling() else _compute
    factors = compute(tensors, forms, dtype)
    return list(zip(factors[::2], factors[1::2], strict=True))


def _compute(tensors: list[Tensor], forms: list[int], dtype: torch.dtype) -> Sequence[Tensor]:
    if compat.is_autocast_active() and torch.is_autocast_enabled(tensors[0].device.type):
        with torch.autocast(tensors[0].device.type, enabled=False):
            return _compute(tensors, forms, dtype)
    if compat.records_operators():
        return _plain_factors(tensors, forms, dtype)
    if torch.is_grad_enabled():
        return _Factors.apply(forms, dtype, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    return _values(_chains(tensors, forms))[0].to(dtype).flatten(0, 1).unbind()


def _chains(tensors: Sequence[Tensor], forms: list[int]) -> Tensor:
    """The chains of all layers, `(n, d, k)`, at least float32."""
    layers = len(tensors) // (len(forms) + sum(map(KEPT.__and__, forms)) // KEPT)
    chains, start = [], 0
    for form in forms:
        trained = torch.stack(tensors[start : start + layers])  # type: ignore[arg-type]
        start += layers
        kept = torch.stack(tensors[start : start + layers]) if form & KEPT else None  # type: ignore[arg-type]
        start += layers * bool(form & KEPT)
        chains.append(chain_of(form, trained.float() if trained.dtype.itemsize < 4 else trained, kept))
    return chains[0] if len(chains) == 1 else torch.cat(chains, dim=-1)


def _plain_factors(tensors: Sequence[Tensor], forms: list[int], dtype: torch.dtype) -> Sequence[Tensor]:
    """Compute the factors with differentiable operators: for functorch, `torch.export`, and second derivatives."""
    chain = householder.normalize(_chains(tensors, forms))
    if not compat.is_exporting():
        # The lengths are not constants, unlike in `householder.normalize`, because second derivatives depend on them.
        lengths = torch.linalg.vector_norm(chain, dim=-2, keepdim=True)
        chain = chain / torch.where(lengths > 0, lengths, 1.0)
    factors = torch.stack([chain.mT, -(householder.compact_wy(chain) @ chain.mT)], dim=-3)
    return factors.to(dtype).flatten(0, 1).unbind()


class Changes:
    """Counts what may make factors wrong: changes of adapters, scales or kept directions; and backward passes.

    A backward pass, because an optimizer step may follow, and fused optimizers do not change the versions of tensors.
    """

    count = 0
    backwards = 0


class _Factors(torch.autograd.Function):
    """The tensors of the chains of all layers -> `R` and `F` of each layer."""

    @staticmethod
    def forward(ctx: Any, forms: list[int], dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        values = _values(_chains(tensors, forms))
        ctx.save_for_backward(*values)
        # Not saved for the backward, because their values are only needed again in special cases.
        ctx.forms, ctx.tensors, ctx.versions = forms, tensors, list(map(compat.VERSION, tensors))
        return values[0].to(dtype).flatten(0, 1).unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        Changes.backwards += 1
        reached = [rows is not None or down is not None for rows, down in zip(grads[::2], grads[1::2], strict=True)]
        if torch.is_grad_enabled():  # create_graph=True
            found = _second_gradients(ctx.forms, _unchanged(ctx), grads)
        else:
            found = _tensor_gradients(ctx, _gradient(_saved_values(ctx), grads))
        layers = len(reached)
        for place, needed in enumerate(ctx.needs_input_grad[2:]):
            if not needed or not reached[place % layers]:
                found[place] = None
        return None, None, *found


def _gradient(values: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> Tensor:
    """The gradient of the chains, `(n, d, k)`."""
    factors, gram, scale, factor, coefficients = values
    zero = factors.new_zeros(factors.shape[2:])
    joint = torch.stack([zero if grad is None else grad.to(zero.dtype) for grad in grads])
    with householder.without_autocast(joint):
        rows, joint = factors[:, 0], joint.reshape(len(factors), -1, factors.shape[-1])
        rows_inner, down_inner = (joint @ rows.mT).to(gram.dtype).chunk(2, dim=1)
        through = factor.mT @ down_inner
        gram_grad = (through @ factor.mT).triu_(1)
        gram_grad = gram_grad + gram_grad.mT
        # The length of a vector does not change the result.
        along = (rows_inner - through + gram_grad @ gram).diagonal(dim1=1, dim2=2)
        inner = (gram_grad - torch.diag_embed(along)) * scale.unsqueeze(1)
        return torch.baddbmm(joint.mT @ coefficients, rows.mT, inner.to(rows.dtype))


def _tensor_gradients(ctx: Any, gradient: Tensor) -> list[Tensor | None]:
    """The gradients of the tensors of the chains, from that of the chains."""
    tensors = _unchanged(ctx) if any(form & GRAM_SCHMIDT for form in ctx.forms) else ctx.tensors
    layers, found, start = len(gradient), list[Tensor | None](), 0
    for form in ctx.forms:
        trained = tensors[start : start + layers]
        start += layers
        kept = torch.stack(tensors[start : start + layers]) if form & KEPT else None
        start += layers * bool(form & KEPT)
        rank = 2 * trained[0].shape[-2] if form & PAIRS else trained[0].shape[-1]
        # Not by slices, which cannot be batched (`is_grads_batched`).
        own, gradient = torch.split(gradient, [rank, gradient.shape[-1] - rank], -1)
        basis = torch.stack(trained) if form & GRAM_SCHMIDT else None
        found += gradient_of(form, own, basis, kept).to(trained[0].dtype).unbind()
        found += [None] * layers * bool(form & KEPT)
    return found


def _second_gradients(
    forms: list[int], tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of which further gradients can be computed."""
    given = [grad for grad in grads if grad is not None]
    factors = _plain_factors(tensors, forms, given[0].dtype)
    outputs = [one for one, grad in zip(factors, grads, strict=True) if grad is not None]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in tensors]


def _saved_values(ctx: Any) -> tuple[Tensor, ...]:
    """The values of the forward; they are computed again if an earlier backward pass has freed them.

    Each of several passes may reach only some of the layers, for example for a model with several outputs.
    """
    try:
        values: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError:
        values = _values(_chains(_unchanged(ctx), ctx.forms))
    return values


def _unchanged(ctx: Any) -> tuple[Tensor, ...]:
    """The tensors of the chains, which must not have changed since the forward."""
    gone = any(tensor.untyped_storage().size() == 0 for tensor in ctx.tensors)
    if gone or ctx.versions != list(map(compat.VERSION, ctx.tensors)):
        raise RuntimeError(
            "the vectors of an adapter were modified by an in-place operation, such as an optimizer step, or freed, "
            "between two backward passes of one forward. Run the forward again before the second one."
        )
    tensors: tuple[Tensor, ...] = ctx.tensors
    return tensors


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


_LIBRARY: Any = torch.library.Library("hra_fx", "FRAGMENT")  # type: ignore[no-untyped-call]  # not typed by torch
_LIBRARY.define(
    "batched_factors(Tensor[] tensors, int[] forms, ScalarType dtype) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("batched_factors", _compute, "CompositeImplicitAutograd")
