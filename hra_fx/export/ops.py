r"""The operator `hra_fx::rotate`: the rotated weight `W -> W Q` as one node of a captured graph.

    rotate(Tensor weight, Tensor vectors, Tensor? anchor, bool apply_GS, bool columns) -> Tensor

`weight` is `(out, d)`, a convolution's `(out, c / groups, ...)`, or `(d, out)` if `columns` (transformers' `Conv1D`);
`vectors` is `U: (d, r)`, `anchor` is `A: (d, k)`. The operator is opaque to tracers: it stays one node in
`run_decompositions`, saving, loading and `torch.compile`, so `fold` can find it. Saved programs contain its argument
names, so these must not change.

Its gradient, with `Q = I - K T K^T`, `K` the unit vectors of the chain, `S = T^-1` (see
`hra_fx.functional.householder`) and `G` the gradient of `W Q`:

    dW = G Q^T
    dK = -(W^T (G K) T^T + G^T (W K) T)                     for constant T, from dQ = W^T G, which is never formed
    dT = -(W K)^T (G K),        dS = -T^T dT T^T            and S = strictly_upper(K^T K) + diag(K^T K) / 2

With Gram-Schmidt, `hra_fx.functional.householder.qr_gradient` gives the gradient of `U`. All of it uses differentiable
operators, so second derivatives exist.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.functional.chain import plain_chain
from hra_fx.functional.rotate import as_rows, rotate_weight, rows_to_weight

# torch has no types for its libraries.
_LIBRARY: Any = torch.library.Library("hra_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "rotate(Tensor weight, Tensor vectors, Tensor? anchor, bool apply_GS, bool columns) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

#: The overload that is the target of graph nodes.
ROTATE = torch.ops.hra_fx.rotate.default


def _rotate(weight: Tensor, vectors: Tensor, anchor: Tensor | None, apply_GS: bool, columns: bool) -> Tensor:
    with _no_autocast(weight):
        chain = plain_chain(vectors.to(_compute_dtype(weight, vectors)), anchor, apply_GS=apply_GS)
        return rotate_weight(weight, chain, transposed=columns)


def _fake(weight: Tensor, vectors: Tensor, anchor: Tensor | None, apply_GS: bool, columns: bool) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.apply_GS, ctx.columns = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, vectors, anchor = ctx.saved_tensors
    with _no_autocast(weight):
        dtype = _compute_dtype(weight, vectors)
        chain = plain_chain(vectors.to(dtype), anchor, apply_GS=ctx.apply_GS)
        unit = householder.normalize(chain)
        factor = householder.compact_wy(unit)
        rows, rows_grad = (as_rows(tensor, transposed=ctx.columns).to(dtype) for tensor in (weight, grad))
        weight_grad = vectors_grad = None
        if ctx.needs_input_grad[0]:
            weight_grad = rows_grad - (rows_grad @ unit) @ factor.mT @ unit.mT
            weight_grad = rows_to_weight(weight_grad, weight, transposed=ctx.columns)
        if ctx.needs_input_grad[1]:
            chain_grad = _chain_grad(rows, rows_grad, unit, factor) / _lengths(chain, unit)
            vectors_grad = chain_grad[:, chain.shape[1] - vectors.shape[1] :]
            if ctx.apply_GS:
                vectors_grad = householder.qr_gradient(vectors_grad, *householder.positive_qr(vectors.to(dtype)))
            vectors_grad = vectors_grad.to(vectors.dtype)
    return weight_grad, vectors_grad, None, None, None


def _chain_grad(rows: Tensor, rows_grad: Tensor, unit: Tensor, factor: Tensor) -> Tensor:
    """`dK: (d, k)`: the direct part, and the part through `T` and the Gram matrix."""
    projected, projected_grad = rows @ unit, rows_grad @ unit
    direct = -(rows.mT @ (projected_grad @ factor.mT) + rows_grad.mT @ (projected @ factor))
    inverse_grad = factor.mT @ (projected.mT @ projected_grad) @ factor.mT
    # The diagonal of S is constant for a zero column, see compact_wy.
    nonzero = (unit != 0).any(dim=0)
    diagonal = torch.where(nonzero, inverse_grad.diagonal() / 2, 0.0)
    gram_grad = inverse_grad.triu(1) + torch.diag(diagonal)
    return direct + unit @ (gram_grad + gram_grad.mT)


def _lengths(chain: Tensor, unit: Tensor) -> Tensor:
    """The lengths that `normalize` divided by; constants, because `Q` does not depend on them."""
    lengths = (chain * unit).sum(dim=0).detach()
    return torch.where(lengths > 0, lengths, 1.0)


def _compute_dtype(weight: Tensor, vectors: Tensor) -> torch.dtype:
    return householder.working_dtype(torch.promote_types(weight.dtype, vectors.dtype))


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Disable autocast, always: inside of a kernel torch does not report whether it is on."""
    device = tensor.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


_LIBRARY.impl("rotate", _rotate, "CompositeExplicitAutograd")
torch.library.register_fake("hra_fx::rotate", _fake, lib=_LIBRARY)
torch.library.register_autograd("hra_fx::rotate", _backward, setup_context=_setup_context, lib=_LIBRARY)
