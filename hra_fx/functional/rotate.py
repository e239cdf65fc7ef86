"""Rotated weights, `W -> W Q`, in any layout and dtype, and the checks before and after folding."""

from __future__ import annotations

import torch
from torch import Tensor

from hra_fx.errors import FoldError
from hra_fx.functional.householder import compact_wy, normalize, without_autocast, working_dtype


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64; on Apple GPUs, which do not have it, float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def rotate_weight(weight: Tensor, vectors: Tensor, *, transposed: bool = False) -> Tensor:
    """Compute the rotated weight `W Q = W - (W U) T U^T`. It is differentiable, and autocast does not affect it.

    Args:
        weight: `(out, d)`, the weight of a convolution `(out, ...)` with `d` entries per output channel, or
            `(d, out)` if `transposed`; for several experts, `(experts, out, d)` or `(experts, d, out)`.
        vectors: `U: (d, k)`, a chain of reflections (after Gram-Schmidt); the columns may
            have any length. For several experts, `(experts, d, k)`.
        transposed: whether the weight is stored as `(d, out)`, like that of transformers' `Conv1D`.

    Returns:
        The rotated weight with the shape and dtype of `weight`, contiguous. It is computed in the wider dtype of the
        two arguments, but at least in float32; for float64, convert both arguments.

    Example:
        >>> rotate_weight(torch.tensor([[2.0, 5.0]]), torch.tensor([[3.0], [0.0]]))
        tensor([[-2.,  5.]])
    """
    with without_autocast(weight):
        dtype = working_dtype(torch.promote_types(weight.dtype, vectors.dtype))
        chain = normalize(vectors.to(dtype))
        rows = as_rows(weight, transposed=transposed, batched=chain.dim() == 3).to(dtype)
        subtract = torch.baddbmm if chain.dim() == 3 else torch.addmm  # without a second tensor of the size of `W`
        rotated = subtract(rows, (rows @ chain) @ compact_wy(chain), chain.mT, alpha=-1)
        return rows_to_weight(rotated, weight, transposed=transposed)


def as_rows(weight: Tensor, *, transposed: bool = False, batched: bool = False) -> Tensor:
    """Reshape a weight to the matrix `(out, d)` that is multiplied by `Q` from the right; a view if possible.

    `transposed` means a weight `(d, out)`, and `batched` keeps the first dimension, that of experts.
    """
    return weight.mT if transposed else weight if batched else weight.flatten(1)


def rows_to_weight(rows: Tensor, weight: Tensor, *, transposed: bool = False) -> Tensor:
    """Undo `as_rows`: convert a matrix `(out, d)` to the shape and dtype of `weight`, contiguous."""
    return (rows.mT if transposed else rows.reshape(weight.shape)).to(weight.dtype).contiguous()


def check_foldable(where: str, weight: Tensor, vectors: Tensor, *, apply_GS: bool, adapter: str) -> None:
    """Raise a `FoldError` if an adapter has no data or no well-defined `Q`; `where` and `adapter` are for messages."""
    if weight.is_meta or vectors.is_meta:
        raise FoldError(f"{where}: the weight or the vectors of {adapter!r} are on the meta device. Load them first.")
    if not apply_GS:
        return
    # `U = V R`: a small entry of the diagonal of `R` is a column in the span of the columns before it.
    wide = normalize(vectors.detach().to(widest_dtype(vectors.device)))
    diagonal = torch.linalg.qr(wide, mode="r").R.diagonal(dim1=-2, dim2=-1).abs()
    if bool((diagonal.amin(-1) <= 8 * torch.finfo(vectors.dtype).eps * diagonal.amax(-1)).any()):
        raise FoldError(
            f"{where}: the vectors of {adapter!r} are linearly dependent, so their Gram-Schmidt basis is rounding "
            "noise. Train with apply_GS=False, or with init_weights=True, which starts with independent vectors."
        )
