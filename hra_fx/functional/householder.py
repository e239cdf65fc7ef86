r"""The mathematics of Householder Reflection Adaptation (HRA, https://arxiv.org/abs/2405.17484), as pure functions.

A *chain* `U: (d, k)` contains the vectors of `k` reflections in its columns. It represents the orthogonal matrix

    Q = H_1 H_2 ... H_k,        H_i = I - 2 u_i u_i^T / (u_i^T u_i)             (paper, eq. 3)

which is never computed. Its compact WY form (Schreiber and Van Loan 1989, https://doi.org/10.1137/0910005) needs one
upper triangular `T: (k, k)`:

    Q = I - U T U^T,            T^-1 = diag(|u_i|^2 / 2) + strictly_upper(U^T U)

An adapted layer uses `W Q` instead of `W`, so it maps a row of inputs as `x -> x Q^T`. With Gram-Schmidt, the
paper's product is `Q = I - 2 V V^T` with orthonormal `V`, which is the chain of the columns of `V`.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, fx, nn

from hra_fx import compat
from hra_fx.functional import exportable

# The fx tracer records each of these functions as one node, because their branches cannot be traced.
for _name in ("normalize", "compact_wy", "reflect", "rotate", "orthonormalize"):
    fx.wrap(_name)


# A table, because torch.export records torch.promote_types as an operator that no exporter supports.
_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for Gram matrices, `T` and QR of vectors of `dtype`: at least float32.

    Example:
        >>> working_dtype(torch.bfloat16), working_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return dtype if dtype in _WIDE else torch.float32


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Disable autocast on the device of a tensor."""
    device = tensor.device.type
    # Do not check the usual devices, because TorchDynamo cannot trace this check in torch 2.10.
    known = device in ("cpu", "cuda") or (device != "meta" and torch.amp.is_autocast_available(device))
    if known and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def normalize(chain: Tensor) -> Tensor:
    """Scale each vector to length 1, which does not change its reflection.

    Unit vectors keep values in the range of narrow dtypes (the scales of `U` and `U T` are inverse to each other), and
    avoid underflow and overflow of `|u|^2` in float32. The lengths are constants for autograd. The gradient is still
    correct, because `Q` does not change along `u`.

    Args:
        chain: `U: (..., d, k)`; a zero column stays zero.

    Returns:
        `(..., d, k)`.

    Example:
        >>> normalize(torch.tensor([[3e-30, 0.0], [4e-30, 0.0]]))
        tensor([[0.6000, 0.0000],
                [0.8000, 0.0000]])
    """
    # detach, not no_grad: torch.export would record no_grad as a nested graph.
    constant = chain.detach()
    # Two steps, because the squares of a column can overflow even if its entries do not.
    largest = constant.abs().amax(dim=-2, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    lengths = torch.linalg.vector_norm(constant / largest, dim=-2, keepdim=True)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return chain / largest / lengths


def compact_wy(chain: Tensor) -> Tensor:
    """Compute the factor `T` of `Q = I - U T U^T`.

    A zero column gives the identity (PEFT returns NaN), and its gradient is finite. Under torch.export, only matrix
    products are used (`hra_fx.functional.exportable`).

    Args:
        chain: `U: (..., d, k)`, floating; under torch.export, `(d, k)`.

    Returns:
        `T: (..., k, k)`, upper triangular, at least float32, even under autocast.

    Example:
        >>> U = torch.tensor([[3.0], [4.0]])
        >>> torch.eye(2) - U @ compact_wy(U) @ U.T
        tensor([[ 0.2800, -0.9600],
                [-0.9600, -0.2800]])
    """
    with without_autocast(chain):
        vectors = chain.to(working_dtype(chain.dtype))
        if compat.is_exporting():
            return exportable.compact_wy(vectors)
        gram = vectors.mT @ vectors
        squares = gram.diagonal(dim1=-2, dim2=-1)
        # A square below the smallest normal number does not have a usable inverse, so the column is treated as zero.
        halves = torch.where(squares > torch.finfo(gram.dtype).tiny, squares / 2, 1.0)
        inverse = gram.triu(1) + torch.diag_embed(halves)
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor: Tensor = torch.linalg.solve_triangular(inverse, identity, upper=True)
    return factor


def reflect(x: Tensor, chain: Tensor, factor: Tensor) -> Tensor:
    """Apply a chain to rows: `x Q^T = x - (x U) T^T U^T`, the input of a Linear with weight `W Q`.

    Args:
        x: `(..., d)`; the products use its dtype.
        chain: `U: (d, k)`.
        factor: `T: (k, k)`, from `compact_wy(chain)`.

    Returns:
        `(..., d)` in the dtype of `x`.

    Example:
        >>> U = torch.tensor([[1.0], [0.0]])
        >>> reflect(torch.tensor([[2.0, 5.0]]), U, compact_wy(U))
        tensor([[-2.,  5.]])
    """
    # U T is computed before the cast, so that a narrow dtype rounds the product only once.
    projection = (chain.to(factor.dtype) @ factor).to(x.dtype)
    return x - ((x @ chain.to(x.dtype)) @ projection.mT).to(x.dtype)


def rotate(weight: Tensor, chain: Tensor, factor: Tensor) -> Tensor:
    """Compute `W Q = W - (W U) T U^T` for matrices of one dtype; see `hra_fx.functional.rotate.rotate_weight`.

    Args:
        weight: `W: (out, d)`; never cast, not even under autocast.
        chain: `U: (d, k)`, in the dtype of `weight`.
        factor: `T: (k, k)`, in the dtype of `weight`.

    Returns:
        `(out, d)`.

    Example:
        >>> U = torch.tensor([[1.0], [0.0]])
        >>> rotate(torch.tensor([[2.0, 5.0]]), U, compact_wy(U))
        tensor([[-2.,  5.]])
    """
    with without_autocast(weight):
        rotated: Tensor = weight - (weight @ chain) @ factor @ chain.mT
    return rotated


def orthonormalize(vectors: Tensor) -> Tensor:
    """Compute Gram-Schmidt by Householder QR: the thin factor `V` of `U = V R`, where `R` has a positive diagonal.

    PEFT uses the classical recurrence, which loses orthogonality with the square of the condition number. Under
    torch.export, `hra_fx.functional.exportable.gram_schmidt` is used instead of QR.

    Args:
        vectors: `U: (..., d, r)` with `r <= d`, of full column rank (see `statistics.inverse_condition`).

    Returns:
        `V: (..., d, r)` with `V^T V = I`, at least float32, even under autocast.

    Example:
        >>> orthonormalize(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    with without_autocast(vectors):
        wide = vectors.to(working_dtype(vectors.dtype))
        if compat.is_exporting():
            # The basis does not depend on the lengths, and the squares of unit vectors do not overflow.
            return exportable.gram_schmidt(normalize(wide))
        if wide.is_cuda:
            return cholesky_basis(wide)
        basis, triangle = torch.linalg.qr(wide)
        signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(basis.dtype)
        # Adding zero turns -0.0 into 0.0 after a sign flip.
        orthonormal: Tensor = basis * signs.unsqueeze(-2) + 0.0
    return orthonormal


def cholesky_basis(vectors: Tensor) -> Tensor:
    """Compute Gram-Schmidt by two Cholesky factorizations, for GPUs, where QR runs dozens of kernels for each matrix.

    CholeskyQR2 (Yamamoto et al. 2015, ETNA 44, pages 306 to 326) is computed in float64. There it is as accurate as
    Householder QR up to a condition number of about 1e8.

    Args:
        vectors: `U: (..., d, r)` of full column rank, at least float32.

    Returns:
        `V: (..., d, r)`, as `orthonormalize` returns it; NaN if a factorization fails.

    Example:
        >>> cholesky_basis(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    rows = normalize(vectors).double().mT
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(rows @ rows.mT)
        factor = factor.masked_fill(failed[..., None, None] > 0, torch.nan)
        rows = torch.linalg.solve_triangular(factor, rows, upper=False)
    return rows.mT.to(vectors.dtype)


def init_vectors(
    d: int,
    r: int,
    *,
    apply_GS: bool,
    init_weights: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """Create initial vectors `U` of an adapter, and a frozen anchor `A`, so that training starts at `Q(A) Q(U) = I`.

    `init_weights=True` draws half of the columns and repeats each of them, as PEFT does (for even `r` and the same
    seed, with the same values), because `H H = I`. With an odd rank, the last column has no partner. Gram-Schmidt needs
    linearly independent columns, so all columns are drawn. In these two cases, `Q(U)` cannot be the identity: an odd
    number of reflections has determinant -1, and `I - 2 V V^T` has `r` eigenvalues -1. But `Q(U)` is its own inverse,
    so the anchor is a copy of the reflected directions: the last column, or all of `V`.

    Args:
        d: length of the vectors.
        r: number of vectors.
        apply_GS: whether the adapter uses Gram-Schmidt.
        init_weights: start at the identity; if False, start with random vectors and without an anchor.
        dtype: dtype of both results.

    Returns:
        `U: (d, r)`, drawn on the CPU from torch's default generator, and `A`: `(d, r)` for Gram-Schmidt, `(d, 1)` for
        an odd rank, else `None`. Both are contiguous.

    Example:
        >>> U, A = init_vectors(5, 3, apply_GS=False, init_weights=True)
        >>> bool((U[:, 0] == U[:, 1]).all()), U.shape, A.shape
        (True, torch.Size([5, 3]), torch.Size([5, 1]))
    """
    vectors = _draw(d, r, dtype, paired=init_weights and not apply_GS)
    return vectors, _anchor(vectors, apply_GS=apply_GS) if init_weights else None


def _draw(d: int, r: int, dtype: torch.dtype, *, paired: bool) -> Tensor:
    """The vectors of `init_vectors`; `paired` repeats each of them."""
    drawn = torch.zeros(d, (r + 1) // 2 if paired else r, dtype=dtype, device="cpu")
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
    return drawn.repeat_interleave(2, dim=1)[:, :r].contiguous() if paired else drawn


def _anchor(vectors: Tensor, *, apply_GS: bool) -> Tensor | None:
    """The anchor of `init_vectors`."""
    if apply_GS:
        # torch.export.save warns about tensors that are not contiguous.
        return orthonormalize(vectors).to(vectors.dtype).contiguous()
    return vectors[:, -1:].clone().contiguous() if anchor_rank(vectors.shape[1], apply_GS=False) else None


def anchor_rank(r: int, *, apply_GS: bool) -> int:
    """The number of vectors in the anchor of `init_vectors`; 0 if no anchor is needed.

    Example:
        >>> anchor_rank(3, apply_GS=False), anchor_rank(4, apply_GS=False), anchor_rank(4, apply_GS=True)
        (1, 0, 4)
    """
    return r if apply_GS else r % 2
