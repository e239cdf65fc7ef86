r"""The mathematics of Householder Reflection Adaptation (HRA, https://arxiv.org/abs/2405.17484), as pure functions.

A *chain* `U: (d, k)` contains the vectors of `k` reflections in its columns. It represents the orthogonal matrix

    Q = H_1 H_2 ... H_k,        H_i = I - 2 u_i u_i^T / (u_i^T u_i)             (paper, eq. 3)

which is never computed. Its compact WY form (Schreiber and Van Loan 1989, https://doi.org/10.1137/0910005) needs one
upper triangular `T: (k, k)`:

    Q = I - U T U^T,            T^-1 = diag(|u_i|^2 / 2) + strictly_upper(U^T U)

An adapted layer uses `W Q` instead of `W`, so it maps a row of inputs as `x -> x Q^T`. With Gram-Schmidt, the
paper's product is `Q = I - 2 V V^T` with orthonormal `V`, which is the chain of the columns of `V`.

`T` is computed with matrix products only, because exporters and other runtimes lack triangular solve. The number of
steps depends only on the shape, so an exported graph does not have loops.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, fx, nn

# An fx tracer records it as one node, because its branches cannot be traced.
fx.wrap("orthonormalize")


# A table, because torch.export records torch.promote_types as an operator that no exporter supports.
_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for Gram matrices, `T` and QR of vectors of `dtype`: at least float32."""
    return dtype if dtype in _WIDE else torch.float32


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Disable autocast on the device of a tensor."""
    device = tensor.device.type
    # Do not check the usual devices, because TorchDynamo cannot trace this check in torch 2.10.
    known = device in ("cpu", "cuda") or (device != "meta" and torch.amp.is_autocast_available(device))
    if known and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def products_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of matrix products of tensors with `dtype`: the dtype of autocast, if it is enabled."""
    if dtype is not torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def normalize(chain: Tensor) -> Tensor:
    """Scale each column of `U: (..., d, k)` to length 1, which does not change its reflection; zeros stay zero.

    Unit vectors keep values in the range of narrow dtypes (the scales of `U` and `U T` are inverse to each other), and
    avoid underflow and overflow of `|u|^2` in float32. The lengths are constants for autograd. The gradient is still
    correct, because `Q` does not change along `u`.

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
    r"""Compute the factor `T: (..., k, k)` of `Q = I - U T U^T`, at least float32, even under autocast.

    A zero column gives the identity (PEFT returns NaN), and its gradient is finite. `T` is computed by doubling:
    inverses of diagonal blocks give inverses of larger blocks.

        T^-1 = D + N,    X_0 = D^-1,    X <- X - X (N o M_s) X    for s = 1, 2, 4, ... < k

    where `M_s` selects the upper right `s x s` part of each `2s x 2s` diagonal block: for `X = diag(A^-1, C^-1)` one
    step gives the inverse of `[A B; 0 C]`, whose corner is `-A^-1 B C^-1`. It is as accurate as a triangular solve; the
    shorter `(I - N)(I + N^2)(I + N^4) ...` loses all digits for nearly parallel columns.

    Example:
        >>> U = torch.tensor([[3.0], [4.0]])
        >>> torch.eye(2) - U @ compact_wy(U) @ U.T
        tensor([[ 0.2800, -0.9600],
                [-0.9600, -0.2800]])
    """
    with without_autocast(chain):
        vectors = chain.to(working_dtype(chain.dtype))
        squares = (vectors * vectors).sum(dim=-2, keepdim=True)
        # A square below the smallest normal number does not have a usable inverse, so the column is treated as zero.
        halves = torch.where(squares > torch.finfo(vectors.dtype).tiny, squares / 2, 1.0)
        index = torch.arange(vectors.shape[-1], device=vectors.device)
        row, column = index.unsqueeze(1), index.unsqueeze(0)
        upper = torch.where(row < column, vectors.mT @ vectors, 0.0)
        factor = torch.where(row == column, halves.reciprocal(), 0.0)
        # An entry belongs to the corner of a block if this is the highest bit in which row and column differ.
        difference = row ^ column
        size = 1
        while size < vectors.shape[-1]:
            corner = (difference >= size) & (difference < 2 * size)
            factor = factor - factor @ torch.where(corner, upper, 0.0) @ factor
            size *= 2
    return factor


def span(chain: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the vectors and the effect of `Q` in it: `I - Q = V M V^T`.

    With `U = V R` (thin QR), `M = R T R^T`. It has the orthogonality error of `Q`, and `I - M` has the eigenvalues of
    `Q`, except those of the rest of the space, which `Q` does not change.

    `T` is computed in the precision and on the device of `U: (d, k)`, everything else in float64 on the CPU. The
    results are `V: (d, m)` and `M: (m, m)` with `m = min(d, k)`.
    """
    vectors, factor = (matrix.detach().cpu().double() for matrix in (chain, compact_wy(chain.detach())))
    basis, triangle = torch.linalg.qr(vectors)
    return basis, triangle @ factor @ triangle.mT


def orthonormalize(vectors: Tensor) -> Tensor:
    """Compute Gram-Schmidt: the factor `V` of `U = V R` with orthonormal columns, where `R` has a positive diagonal.

    In PEFT's recurrence, orthogonality is lost with the square of the condition number. Here each projection is applied
    twice, and the second one removes the rounding error of the first ("twice is enough", Giraud et al. 2005,
    https://doi.org/10.1007/s00211-005-0615-4). All runtimes support these operators, unlike QR.

    `U: (..., d, r)` must have full column rank. `V: (..., d, r)` is at least
    float32, even under autocast.

    Example:
        >>> orthonormalize(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    with without_autocast(vectors):
        # The basis does not depend on the lengths, and the squares of unit vectors do not overflow.
        units = normalize(vectors.to(working_dtype(vectors.dtype)))
        columns: list[Tensor] = []
        for column in torch.split(units, 1, dim=-1):
            if columns:
                basis = torch.cat(columns, dim=-1)
                for _ in range(2):
                    column = column - basis @ (basis.mT @ column)
            columns.append(column / (column * column).sum(dim=-2, keepdim=True).sqrt())
        return torch.cat(columns, dim=-1)


def init_vectors(d: int, r: int, *, apply_GS: bool, init_weights: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Create the initial vectors `U: (d, r)` of an adapter, on the CPU, from torch's default generator.

    `init_weights=True` draws half of the columns and repeats each of them, as PEFT does (for the same seed, with the
    same values), so that `Q = I`, because `H H = I`. This is not possible for an odd rank, whose `Q` has determinant
    -1, or with Gram-Schmidt, which needs linearly independent columns. In these cases, and for `init_weights=False`,
    all columns are drawn.

    Example:
        >>> U = init_vectors(5, 4, apply_GS=False, init_weights=True)
        >>> bool((U[:, 0::2] == U[:, 1::2]).all()), U.shape
        (True, torch.Size([5, 4]))
    """
    repeated = init_weights and not apply_GS and r % 2 == 0
    vectors = torch.zeros(d, r // 2 if repeated else r, dtype=dtype, device="cpu")
    nn.init.kaiming_uniform_(vectors, a=math.sqrt(5))
    return vectors.repeat_interleave(2, dim=1) if repeated else vectors
