r"""Reflected rows as one node of autograd: `y = x Q^T` in the fewest and best shaped products.

With `Z = x U T^T` and, for the gradient `G` of `y`, `R = G U T`, both `(n, k)`:

    y = x - Z U^T,        dL/dx = G - R U^T,        dL/dU = U (S + S^T) - x^T R - G^T Z,        S = M o (R^T Z)

where `M`, ones above the diagonal and halves on it, takes `U^T U` to `T^-1`. Of the forward only `x`, `U`, `T` and `Z`
are kept. All skinny matrices are made as `(k, n)` and `(k, d)`: BLAS is several times faster at a product that is short
and wide than at its transpose, tall and narrow. A gradient of the gradient is that of the plain formula.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hra_fx import householder

# Half of the squared lengths for which float32 has room to spare; vectors of others are brought to length one first.
_IN_RANGE = (1e-20, 1e20)
_WIDE = (torch.float32, torch.float64)


def applies(x: Tensor, *made_of: Tensor) -> bool:
    """Whether rows can be reflected in this way: plain tensors on one device, computed with by plain PyTorch.

    Whoever traces, exports or transforms functions gets the plain formula instead, made of operators that he knows.

    Args:
        x: the rows.
        made_of: what their reflections are made of.
    """
    device = x.device
    return (
        device.type in ("cpu", "cuda")
        and x.is_floating_point()
        and all(type(part) in (Tensor, nn.Parameter) and part.device == device for part in (x, *made_of))
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
    )


def reflected(x: Tensor, vectors: Tensor) -> Tensor:
    """Rows turned by a chain, `x -> x Q^T`.

    Args:
        x: `(..., d)`, floating.
        vectors: `U: (d, k)`, of any length each.

    Returns:
        `(..., d)` in the dtype of `x`.

    Example:
        >>> reflected(torch.tensor([[2.0, 5.0]]), torch.tensor([[3.0], [0.0]]))
        tensor([[-2.,  5.]])
    """
    dtype = products_dtype(x)
    with householder.without_autocast(x):
        chain, factor = bearable(vectors, dtype)
        turned: Tensor = _Reflected.apply(x, chain, factor, dtype)  # type: ignore[no-untyped-call]
    return turned


def may_keep(x: Tensor) -> bool:
    """Whether factors may be kept for these rows (`hra_fx.kept`): no gradient is asked for, and nobody records."""
    recorded = type(x) is not Tensor or torch.compiler.is_compiling()
    return not recorded and not torch.is_grad_enabled() and x.device.type == "cpu"


def factors(chain: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What rows have to be multiplied with, for `turned`.

    Args:
        chain: `U: (d, k)` of length one each.
        dtype: that of the products.

    Returns:
        `U^T` and `(U T)^T`, `(k, d)` both.
    """
    with householder.without_autocast(chain):
        factor = householder.compact_wy(chain)
        # U T is made before the cast, so that a narrow dtype rounds the small factor once and not T and U apart.
        both = (chain, chain.to(factor.dtype) @ factor)
        first, second = (matrix.to(dtype).mT.contiguous() for matrix in both)
    return first, second


def turned(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Rows turned by what `factors` gave, in two products; without gradients.

    Example:
        >>> turned(torch.tensor([[2.0, 5.0]]), *factors(torch.tensor([[1.0], [0.0]]), torch.float32))
        tensor([[-2.,  5.]])
    """
    with householder.without_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        return _less(rows, torch.mm(first, rows.to(first.dtype).mT), second.mT).view(x.shape)


def products_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with `x` run here and now: its own, or that of autocast."""
    device = x.device.type
    if x.dtype is not torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def bearable(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same reflections by vectors whose lengths products can bear, and their factor.

    Args:
        vectors: `U: (d, k)`, of any length each.
        dtype: that of the products.

    Returns:
        `U: (d, k)`, itself where nothing has to be done, and `T: (k, k)`, a constant to autograd; float32 or wider.
    """
    chain = vectors.to(householder.working_dtype(vectors.dtype))
    if chain.is_inference() and not torch.is_inference_mode_enabled():  # autograd keeps none of these
        chain = chain.clone()
    # Elsewhere than on a CPU a look at numbers has to wait for them.
    if dtype in _WIDE and chain.device.type == "cpu":
        with torch.no_grad():
            inverse = torch.mm(chain.mT, chain).mul_(_kept_mask(chain.shape[1], chain.dtype))
            halves = inverse.diagonal().tolist()
            if _IN_RANGE[0] < min(halves) and max(halves) < _IN_RANGE[1]:
                identity = _kept_identity(chain.shape[1], chain.dtype)
                return chain, torch.linalg.solve_triangular(inverse, identity, upper=True)
    chain = householder.normalize(chain)
    with torch.no_grad():
        return chain, householder.compact_wy(chain)


def _mask(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`M: (k, k)`; kept on the CPU, where making it takes as long as a product of rows."""
    return _kept_mask(size, dtype) if device.type == "cpu" else _made_mask(size, dtype, device)


def _made_mask(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    ones = torch.ones(size, size, dtype=dtype, device=device)
    return ones.triu(1) + ones.triu().tril() / 2


@functools.cache
def _kept_mask(size: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return _made_mask(size, dtype, torch.device("cpu"))


@functools.cache
def _kept_identity(size: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.eye(size, dtype=dtype, device="cpu")


class _Reflected(torch.autograd.Function):
    """`(x, U, T, dtype of the products) -> x - x U T^T U^T`, where `T` is that of `U`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        rows, wide = x.reshape(-1, x.shape[-1]), torch.promote_types(dtype, factor.dtype)
        columns = chain.to(dtype)
        read = torch.mm(columns.mT, rows.to(dtype).mT)
        read = torch.mm(factor.to(wide), read.to(wide))
        ctx.save_for_backward(x, chain, factor, read)
        ctx.dtype, ctx.wide = dtype, wide
        return _less(rows, read.to(dtype), columns).view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, chain, factor, read = ctx.saved_tensors
        if torch.is_grad_enabled():  # there may be a gradient of the gradient
            return *_plain_gradients(x, chain, gradient, ctx.needs_input_grad), None, None
        with householder.without_autocast(x):
            rows, given = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, x.shape[-1])
            narrow, columns = given.to(ctx.dtype), chain.to(ctx.dtype)
            back = torch.mm(columns.mT, narrow.mT)
            back = torch.mm(factor.to(ctx.wide).mT, back.to(ctx.wide))
            of_x = _less(given, back.to(ctx.dtype), columns).view(x.shape) if ctx.needs_input_grad[0] else None
            if not ctx.needs_input_grad[1]:
                return of_x, None, None, None
            inner = torch.mm(back, read.mT).to(chain.dtype)
            inner = inner.mul_(_mask(inner.shape[0], inner.dtype, inner.device))
            of_chain = torch.mm(inner + inner.mT, chain.mT)
            if ctx.dtype is chain.dtype:
                of_chain.addmm_(back, rows.to(ctx.dtype), alpha=-1).addmm_(read, narrow, alpha=-1)
            else:  # each rounded once
                of_chain -= torch.mm(back.to(ctx.dtype), rows.to(ctx.dtype))
                of_chain -= torch.mm(read.to(ctx.dtype), narrow)
        return of_x, of_chain.mT, None, None


def _less(rows: Tensor, read: Tensor, columns: Tensor) -> Tensor:
    """`rows - read^T U^T`, in the dtype of the rows; `read: (k, n)`, `columns: U`."""
    if rows.dtype is columns.dtype:
        return torch.addmm(rows, read.mT, columns.mT, alpha=-1)
    return rows - torch.mm(read.mT, columns.mT).to(rows.dtype)


def _plain_gradients(
    x: Tensor, chain: Tensor, gradient: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the plain formula, which can be differentiated again."""
    asked = [tensor for tensor, needed in zip((x, chain), wanted, strict=False) if needed]
    turned = householder.reflect(x, chain, householder.compact_wy(chain))
    found = iter(torch.autograd.grad(turned, asked, gradient, create_graph=True))
    return next(found) if wanted[0] else None, next(found) if wanted[1] else None
