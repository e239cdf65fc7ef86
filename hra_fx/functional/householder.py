r"""The mathematics of Householder reflection adaptation (HRA, https://arxiv.org/abs/2405.17484), as pure functions.

A *chain* `U: (d, k)` holds the vectors of `k` reflections in its columns, and stands for the orthogonal matrix

    Q = H_1 H_2 ... H_k,        H_i = I - 2 u_i u_i^T / (u_i^T u_i)             (paper, eq. 3)

which is never formed. Its compact WY form (Schreiber and Van Loan 1989, https://doi.org/10.1137/0910005) needs one
upper triangular `T: (k, k)`:

    Q = I - U T U^T,            T^-1 = diag(|u_i|^2 / 2) + strictly_upper(U^T U)

A weight is adapted as `W -> W Q`, so a row of inputs as `x -> x Q^T`. With Gram-Schmidt the paper's product collapses
to `Q = I - 2 V V^T` with orthonormal `V`, which is again a plain chain: that of the columns of `V`.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.functional import exportable as products

# Seen as one node each by an fx tracer that goes into a reflection, where their branches would stop it.
for _name in ("normalize", "compact_wy", "reflect", "rotate", "orthonormalize"):
    fx.wrap(_name)


# Looked up, for torch.export records a call of torch.promote_types as an operator, which no exporter knows.
_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which Gram matrices, `T` and QR of vectors of `dtype` are computed: float32 at least.

    Example:
        >>> working_dtype(torch.bfloat16), working_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return dtype if dtype in _WIDE else torch.float32


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Products in the dtypes that they are written in, on the device of a tensor."""
    device = tensor.device.type
    # Not asked for the usual devices: TorchDynamo cannot trace the question in torch 2.9.
    known = device in ("cpu", "cuda") or (device != "meta" and torch.amp.is_autocast_available(device))
    if known and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def normalize(chain: Tensor) -> Tensor:
    """The same reflections by vectors of length one, since a reflection does not depend on the length.

    It keeps narrow dtypes in range (`U` and `U T` have scales that are inverse to each other) and float32 from under-
    and overflow in `|u|^2`. The lengths count as constants, which leaves the gradient as it is: `Q` does not change
    along `u`.

    Args:
        chain: `U: (..., d, k)`; a zero column stays zero.

    Returns:
        `(..., d, k)`.

    Example:
        >>> normalize(torch.tensor([[3e-30, 0.0], [4e-30, 0.0]]))
        tensor([[0.6000, 0.0000],
                [0.8000, 0.0000]])
    """
    # Detached, and not in a block without gradients, which an exported program would hold as a block of its own.
    held = chain.detach()
    # In two steps, for the squares of a column may leave the range though its entries do not.
    largest = held.abs().amax(dim=-2, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    lengths = torch.linalg.vector_norm(held / largest, dim=-2, keepdim=True)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return chain / largest / lengths


def compact_wy(chain: Tensor) -> Tensor:
    """The factor `T` of `Q = I - U T U^T`.

    A zero column stands for the identity (PEFT gives NaN there), and its gradient is finite. While torch.export
    reads it, it is made of products alone (`hra_fx.functional.exportable`).

    Args:
        chain: `U: (..., d, k)`, floating; of torch.export, `(d, k)`.

    Returns:
        `T: (..., k, k)`, upper triangular, float32 or wider, also under autocast.

    Example:
        >>> U = torch.tensor([[3.0], [4.0]])
        >>> torch.eye(2) - U @ compact_wy(U) @ U.T
        tensor([[ 0.2800, -0.9600],
                [-0.9600, -0.2800]])
    """
    with without_autocast(chain):
        vectors = chain.to(working_dtype(chain.dtype))
        if torch.compiler.is_exporting():
            return products.inverse_factor(vectors)
        gram = vectors.mT @ vectors
        squares = gram.diagonal(dim1=-2, dim2=-1)
        # A square below the smallest normal number has no usable inverse: such a column reflects nothing.
        halves = torch.where(squares > torch.finfo(gram.dtype).tiny, squares / 2, 1.0)
        inverse = gram.triu(1) + torch.diag_embed(halves)
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor: Tensor = torch.linalg.solve_triangular(inverse, identity, upper=True)
    return factor


def reflect(x: Tensor, chain: Tensor, factor: Tensor) -> Tensor:
    """Rows `x` turned by the chain, `x Q^T = x - (x U) T^T U^T`: what a Linear with weight `W Q` sees of `x`.

    Args:
        x: `(..., d)`; the products run in its dtype.
        chain: `U: (d, k)`.
        factor: `T: (k, k)` of `compact_wy(chain)`.

    Returns:
        `(..., d)` in the dtype of `x`.

    Example:
        >>> U = torch.tensor([[1.0], [0.0]])
        >>> reflect(torch.tensor([[2.0, 5.0]]), U, compact_wy(U))
        tensor([[-2.,  5.]])
    """
    # U T is made before the cast, so that a narrow dtype rounds the small factor once and not T and U apart.
    turned = (chain.to(factor.dtype) @ factor).to(x.dtype)
    return x - ((x @ chain.to(x.dtype)) @ turned.mT).to(x.dtype)


def rotate(weight: Tensor, chain: Tensor, factor: Tensor) -> Tensor:
    """The folded weight `W Q = W - (W U) T U^T`.

    Args:
        weight: `(out, d)`, any further dimensions already flattened into `d`; not cast, also under autocast.
        chain: `U: (d, k)`, the dtype of `weight`.
        factor: `T: (k, k)`, the dtype of `weight`.

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
    """Gram-Schmidt by Householder QR: the thin factor `V` of `U = V R` with a positive diagonal of `R`.

    PEFT runs the classical recurrence, whose loss of orthogonality grows with the square of the condition number. While
    torch.export reads it, `hra_fx.functional.exportable.gram_schmidt` takes the place of QR.

    Args:
        vectors: `U: (d, r)` with `r <= d`, of full column rank (see `dependence`).

    Returns:
        `V: (d, r)` with `V^T V = I`, float32 or wider, also under autocast.

    Example:
        >>> orthonormalize(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    with without_autocast(vectors):
        wide = vectors.to(working_dtype(vectors.dtype))
        if torch.compiler.is_exporting():
            # The basis does not depend on lengths, and these have squares that are in range.
            return products.gram_schmidt(normalize(wide))
        return positive_qr(wide)[0]


def positive_qr(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """`V: (d, r)` and `R: (r, r)` of `U = V R` with a positive diagonal of `R`, which makes them unique.

    Args:
        vectors: `U: (d, r)` with `r <= d`, of full column rank, float32 or wider.

    Example:
        >>> positive_qr(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))[1]
        tensor([[3., 1.],
                [0., 2.]])
    """
    basis, triangle = torch.linalg.qr(vectors)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(basis.dtype)
    # Adding zero turns the -0.0 that a flipped sign leaves into 0.0.
    return basis * signs + 0.0, triangle * signs.unsqueeze(1) + 0.0


def qr_gradient(for_basis: Tensor, basis: Tensor, triangle: Tensor) -> Tensor:
    r"""The gradient of the vectors whose basis has a given one; in operators that can be differentiated.

    For `U = V R`, with `C` the lower triangle of `dV^T V`, mirrored to the upper one, `dU^T = R^-1 (dV^T - C V^T)`
    (Walter and Lehmann 2012, https://arxiv.org/abs/1001.1654).

    Args:
        for_basis: `dV: (d, r)`.
        basis: `V: (d, r)`.
        triangle: `R: (r, r)`, of any signs.

    Returns:
        `dU: (d, r)`.

    Example:
        >>> qr_gradient(torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0]]))
        tensor([[0.],
                [2.]])
    """
    inner = torch.mm(for_basis.mT, basis)
    mirrored = inner.tril() + inner.tril(-1).mT
    given = torch.addmm(for_basis.mT, mirrored, basis.mT, alpha=-1)
    # By columns, as LAPACK wants it: the other way round it would be copied.
    solved: Tensor = torch.linalg.solve_triangular(triangle.mT, given.mT, upper=False, left=False)
    return solved


def dependence(vectors: Tensor) -> float:
    """How far the columns of `U: (d, r)` are from being dependent: `min |R_ii| / max |R_ii|` of `U = V R`, in [0, 1].

    Near the epsilon of the dtype of `U` the Gram-Schmidt basis is rounding noise: there is no such `Q`.

    Example:
        >>> dependence(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        0.0
    """
    diagonal = torch.linalg.qr(vectors.detach().double(), mode="r").R.diagonal().abs()
    largest = float(diagonal.max())
    return float(diagonal.min()) / largest if largest > 0 else 0.0


def start(
    d: int,
    r: int,
    *,
    apply_GS: bool,
    init_weights: bool,
    dtype: torch.dtype = torch.float32,
    on_meta: bool = False,
) -> Tensor:
    """Fresh vectors `U: (d, r)`, drawn from torch's default generator on the CPU; `on_meta` draws none.

    `init_weights=True` draws half of the columns and takes each twice, as PEFT does (the same numbers for the same seed
    where `r` is even), since `H H = I`; the last column of an odd rank stays single. Gram-Schmidt needs independent
    columns, so there all are drawn. What is left of the start is taken back by `anchor`.

    Example:
        >>> U = start(5, 3, apply_GS=False, init_weights=True)
        >>> bool((U[:, 0] == U[:, 1]).all()), U.shape
        (True, torch.Size([5, 3]))
    """
    paired = init_weights and not apply_GS
    drawn = torch.zeros(d, (r + 1) // 2 if paired else r, dtype=dtype, device="meta" if on_meta else "cpu")
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
    return drawn.repeat_interleave(2, dim=1)[:, :r].contiguous() if paired else drawn


def anchor(vectors: Tensor, *, apply_GS: bool) -> Tensor | None:
    """The frozen prefix `A` that undoes the start: with `Q = Q(A) Q(U)`, training begins at `Q = I` exactly.

    Gram-Schmidt can never be the identity by itself (`I - 2 V V^T` has `r` eigenvalues -1) and neither can an odd
    number of reflections (determinant -1). Both starts are their own inverse, so the anchor is what the start turns:
    all of `V`, or the single last column.

    Args:
        vectors: `U: (d, r)` as `start(..., init_weights=True)` gave it.
        apply_GS: whether the adapter runs Gram-Schmidt.

    Returns:
        `A: (d, r)` for Gram-Schmidt, `(d, 1)` for an odd rank, `None` where the start is the identity already.

    Example:
        >>> anchor(start(5, 3, apply_GS=False, init_weights=True), apply_GS=False).shape
        torch.Size([5, 1])
    """
    if apply_GS:
        return orthonormalize(vectors).to(vectors.dtype)
    return vectors[:, -1:].clone() if vectors.shape[1] % 2 else None


def principal_block(chain: Tensor, factor: Tensor) -> Tensor:
    """`Q` seen inside the span of its vectors, where alone it differs from the identity.

    With `U = V R` (thin QR), `Q = I - V (R T R^T) V^T`: the block is `I - R T R^T`. It is as orthogonal as `Q` is, and
    its eigenvalues are those of `Q`, less the ones that the rest of the space adds.

    Args:
        chain: `U: (d, k)`.
        factor: `T: (k, k)`, in the precision whose effect is asked for.

    Returns:
        `(m, m)` with `m = min(d, k)`, float64, on the CPU.

    Example:
        >>> U = torch.tensor([[0.0], [2.0]])
        >>> principal_block(U, compact_wy(U))
        tensor([[-1.]], dtype=torch.float64)
    """
    vectors, inner = (matrix.detach().to("cpu", torch.float64) for matrix in (chain, factor))
    triangle: Tensor = torch.linalg.qr(vectors, mode="r").R
    return torch.eye(triangle.shape[0], dtype=triangle.dtype) - triangle @ inner @ triangle.mT


class Turn(NamedTuple):
    """What a chain does, in numbers.

    Attributes:
        rotation: `|Q - I|_F`.
        angles: by how much each plane is turned, in radians from 0 to pi, falling; see `turn`.
        orthogonality: `|Q^T Q - I|_F` for `T` in the precision of the chain.
    """

    rotation: float
    angles: tuple[float, ...]
    orthogonality: float

    @property
    def angle(self) -> float:
        """The largest angle, in radians; 0 where nothing turns, pi where a direction is reflected."""
        return self.angles[0] if self.angles else 0.0

    @property
    def mean_angle(self) -> float:
        """The mean of the angles, in radians; 0 where nothing turns."""
        return sum(self.angles) / len(self.angles) if self.angles else 0.0


def turn(chain: Tensor) -> Turn:
    """How far a chain is from the identity, from `k x k` matrices only; NaN for one without data, or not finite.

    `Q` turns planes that are orthogonal to each other, leaves what is orthogonal to all of them, and where its
    determinant is -1 reflects one direction more. A plane has one angle, though two eigenvalues of `Q` tell of it; a
    reflected direction has one too, pi (two of them are a plane that is turned by pi). Angles of no more than
    `angle_floor` are what rounding leaves of vectors that cancel each other, and are no angles.

    Args:
        chain: `U: (d, k)`.

    Example:
        >>> U = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # half of 90 degrees apart, and one
        >>> [round(math.degrees(angle)) for angle in turn(U).angles]
        [180, 90]
    """
    if not chain.shape[1]:
        return Turn(0.0, (), 0.0)
    vectors = normalize(chain.detach())
    if vectors.is_meta or not bool(torch.isfinite(vectors).all()):
        return Turn(math.nan, (math.nan,), math.nan)
    block = principal_block(vectors, compact_wy(vectors))
    identity = torch.eye(block.shape[0], dtype=block.dtype)
    norms = (torch.linalg.matrix_norm(matrix) for matrix in (block - identity, block.mT @ block - identity))
    rotation, orthogonality = (float(norm) for norm in norms)
    # Falling, each plane's angle stands there twice, behind a lone pi where there is one: so every other one is meant.
    angles = torch.linalg.eigvals(block).angle().abs().sort(descending=True).values[::2]
    return Turn(rotation, tuple(angles[angles > angle_floor(chain)].tolist()), orthogonality)


def angle_floor(chain: Tensor) -> float:
    """The largest angle that may be rounding, in radians: eight times `k` times the epsilon in which `T` is computed.

    Example:
        >>> f"{angle_floor(torch.ones(100, 8)):.0e}"
        '8e-06'
    """
    return 8 * chain.shape[1] * torch.finfo(working_dtype(chain.dtype)).eps
