r"""Adapted convolutions, from the factors `R` and `F` of their adapters (`hra_fx.kernels.factors`).

With `W` reshaped to `(out, d)` and a patch `p`, `(W Q) p = W p + (W R^T) (F p)`: the convolution and a correction of
its output. The product `W R^T` costs as much as `k` patches. For few patches, `(W Q) p = W (p + R^T (F p))` is cheaper.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hra_fx.kernels.factors import Factors

#: From this number of patches per vector, correcting the output is cheaper, as measured on CPUs.
MIN_PATCHES_PER_VECTOR = 8


def convolve_patches(
    x: Tensor,
    factors: Factors,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Compute a Conv2d with the weight `W Q: (out, c, ...)`, without groups, as matrix products with its patches.

    `x: (n, c, height, width)` is padded, and the factors have its dtype. The result is contiguous.
    """
    rows, down = factors
    kernel = weight.shape[2:]
    patches = F.unfold(x, kernel, dilation=dilation, stride=stride).transpose(0, 1).flatten(1)
    reflected = torch.addmm(patches, rows.mT, down @ patches)
    flat = weight.flatten(1)
    output = flat @ reflected if bias is None else torch.addmm(bias.unsqueeze(1), flat, reflected)
    size = positions(x.shape[2:], kernel, stride, dilation)
    return output.view(len(flat), len(x), *size).transpose(0, 1).contiguous()


def positions(
    size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> list[int]:
    """The output size of a convolution with a padded input."""
    steps = zip(size, kernel, stride, dilation, strict=True)
    return [(length - spread * (width - 1) - 1) // step + 1 for length, width, step, spread in steps]


def add_up_projection(output: Tensor, up: Tensor, projected: Tensor, dimensions: int) -> Tensor:
    """Compute `y + D z` at each position as a matrix product. A 1x1 convolution would take several times as long.

    Args:
        output: `y: (n, out, ...)` or `(out, ...)`, contiguous; modified in place if no gradient is needed.
        up: `D: (out, k)`.
        projected: `z: (n, k, ...)` or `(k, ...)`, at the same positions.
        dimensions: number of spatial dimensions.
    """
    batch, positions = output.shape[0] if output.dim() > dimensions + 1 else 1, math.prod(output.shape[-dimensions:])
    flat, low = (
        tensor.reshape(batch, channels, positions)
        for tensor, channels in ((output, up.shape[0]), (projected, up.shape[1]))
    )
    matrices = up.expand(batch, -1, -1)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (output, up, projected)):
        return torch.baddbmm(flat, matrices, low).view(output.shape)
    flat.baddbmm_(matrices, low)
    return output
