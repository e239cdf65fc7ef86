r"""The operator `hra_fx::rotate`: a weight with its reflections, `W -> W Q`, as one node of a captured graph.

    rotate(Tensor weight, Tensor vectors, Tensor? anchor, bool apply_GS, bool columns) -> Tensor

`weight` is `(out, d)`, a convolution's `(out, c / groups, ...)`, or with `columns` the `(d, out)` of GPT-2's layers;
`vectors` is `U: (d, r)`, `anchor` `A: (d, k)`. It is opaque to tracers, so that it stays one node through
`run_decompositions`, saving, loading and `torch.compile`, and can be found again when the program is folded.

Its gradient, with `Q = I - K T K^T`, `K` the unit vectors of the chain, `S = T^-1` (see `hra_fx.functional.householder`) and `G`
the gradient of `W Q`:

    dW = G Q^T
    dK = -(W^T (G K) T^T + G^T (W K) T)                     with T held fixed, from dQ = W^T G, which is never formed
    dT = -(W K)^T (G K),        dS = -T^T dT T^T            and S = strictly_upper(K^T K) + diag(K^T K) / 2

With Gram-Schmidt that of `U` follows by `hra_fx.functional.householder.qr_gradient`. Written in differentiable operators, so that
it can be differentiated again.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.layers.adapters import plain_chain
from hra_fx.layers.target import as_rows

# torch does not type its libraries.
_LIBRARY: Any = torch.library.Library("hra_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "rotate(Tensor weight, Tensor vectors, Tensor? anchor, bool apply_GS, bool columns) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

#: The operator, as it stands in graphs.
ROTATE = torch.ops.hra_fx.rotate.default


def rotated_weight(weight: Tensor, vectors: Tensor, anchor: Tensor | None, apply_GS: bool, columns: bool) -> Tensor:
    """What the operator computes: in float32 at least, or the wider dtype of its arguments, also under autocast.

    Args:
        weight: `W`, as the operator takes it.
        vectors: `U: (d, r)`.
        anchor: `A: (d, k)`, if there is one.
        apply_GS: whether Gram-Schmidt makes the vectors orthonormal first.
        columns: whether `weight` is `(d, out)`.

    Returns:
        The rotated weight, in the shape and dtype of `weight`, contiguous.

    Example:
        >>> rotated_weight(torch.tensor([[2.0, 5.0]]), torch.tensor([[1.0], [0.0]]), None, False, False)
        tensor([[-2.,  5.]])
    """
    with _exactly(weight):
        wide = _wide(weight, vectors)
        chain = householder.normalize(plain_chain(vectors.to(wide), anchor, apply_GS=apply_GS))
        rows = householder.rotate(as_rows(weight, columns=columns).to(wide), chain, householder.compact_wy(chain))
        return _as_weight(rows, weight, columns)


def _fake(weight: Tensor, vectors: Tensor, anchor: Tensor | None, apply_GS: bool, columns: bool) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.apply_GS, ctx.columns = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, vectors, anchor = ctx.saved_tensors
    with _exactly(weight):
        wide = _wide(weight, vectors)
        chain = plain_chain(vectors.to(wide), anchor, apply_GS=ctx.apply_GS)
        unit = householder.normalize(chain)
        factor = householder.compact_wy(unit)
        rows, upstream = (as_rows(tensor, columns=ctx.columns).to(wide) for tensor in (weight, grad))
        for_weight = for_vectors = None
        if ctx.needs_input_grad[0]:
            for_weight = _as_weight(upstream - (upstream @ unit) @ factor.mT @ unit.mT, weight, ctx.columns)
        if ctx.needs_input_grad[1]:
            for_chain = _chain_gradient(rows, upstream, unit, factor) / _lengths(chain, unit)
            for_vectors = for_chain[:, chain.shape[1] - vectors.shape[1] :]
            if ctx.apply_GS:
                for_vectors = householder.qr_gradient(for_vectors, *householder.positive_qr(vectors.to(wide)))
            for_vectors = for_vectors.to(vectors.dtype)
    return for_weight, for_vectors, None, None, None


def _chain_gradient(rows: Tensor, upstream: Tensor, unit: Tensor, factor: Tensor) -> Tensor:
    """`dK: (d, k)`, by `T` and by the Gram matrix that `T` is made of."""
    read, sent = rows @ unit, upstream @ unit
    direct = -(rows.mT @ (sent @ factor.mT) + upstream.mT @ (read @ factor))
    for_inverse = factor.mT @ (read.mT @ sent) @ factor.mT
    # A zero column has a constant on the diagonal of S, see compact_wy.
    counts = (unit != 0).any(dim=0)
    diagonal = torch.where(counts, for_inverse.diagonal() / 2, 0.0)
    for_gram = for_inverse.triu(1) + torch.diag(diagonal)
    return direct + unit @ (for_gram + for_gram.mT)


def _lengths(chain: Tensor, unit: Tensor) -> Tensor:
    """The lengths that `normalize` divided by: constants, since `Q` has none."""
    lengths = (chain * unit).sum(dim=0).detach()
    return torch.where(lengths > 0, lengths, 1.0)


def _wide(weight: Tensor, vectors: Tensor) -> torch.dtype:
    return householder.working_dtype(torch.promote_types(weight.dtype, vectors.dtype))


def _as_weight(rows: Tensor, weight: Tensor, columns: bool) -> Tensor:
    return (rows.mT if columns else rows.reshape(weight.shape)).to(weight.dtype).contiguous()


def _exactly(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Without autocast, which would run the products of a kernel in half precision."""
    device = tensor.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


_LIBRARY.impl("rotate", rotated_weight, "CompositeExplicitAutograd")
torch.library.register_fake("hra_fx::rotate", _fake, lib=_LIBRARY)
torch.library.register_autograd("hra_fx::rotate", _backward, setup_context=_remember, lib=_LIBRARY)
