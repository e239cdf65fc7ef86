r"""The three forms in which a site applies its reflections: on the rows that it reads, on patches, and on the weight.

All compute with `W Q`, for `W` seen as `(out, d)`. The first two leave the weight alone, and cost two skinny products;
the third makes `W Q` itself, at two to six times the cost in training, and is for weights that somebody else reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx import householder
from hra_fx.carrier.swap import original_class
from hra_fx.reflection import Reflection
from hra_fx.site import SiteKind, has_columns, kind_of, width_of

_CONVOLVE: dict[SiteKind, Callable[..., Tensor]] = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


class LinearReflection(Reflection):
    """Reflects the input of a Linear: `x -> x Q^T`."""

    def forward(self, x: Tensor) -> Tensor:
        """`x: (..., d)` to `(..., d)`, the same dtype."""
        chain = self.chain_for(x)
        return x if chain is None else householder.reflect(x, chain, householder.compact_wy(chain))


class ConvReflection(Reflection):
    """Reads every patch of a convolution's input in the coordinates of the reflection vectors.

    With `W` seen as `(out, d)` and `p` a patch, `(W Q) p = W p - (W U) (T U^T p)`: the parenthesis on the right is a
    convolution with `k` filters, made here; the layer subtracts its 1x1 image under `W U` (`project`). No patch is ever
    unfolded, and no rotated weight made, so the gradient of a whole weight is never needed either.
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        """An empty container for a convolution, of which only the geometry is kept."""
        super().__init__(width_of(conv), kind_of(conv))
        self.patch = tuple(conv.weight.shape[1:])
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding_mode = conv.padding_mode
        self.padding = conv.padding
        # torch's own list for F.pad, from which the other padding modes work ('same' included).
        self.border = list(conv._reversed_padding_repeated_twice)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Coordinates of the patches.

        Args:
            x: `(n, c, ...)` or `(c, ...)`, with as many more dimensions as the kernel has.

        Returns:
            `T U^T p` for every patch and group, `(n, groups * k, ...)`, in the dtype of `x`, and the chain `U: (d, k)`
            itself; `None` where no adapter is active.
        """
        chain = self.chain_for(x)
        if chain is None:
            return None
        factor = householder.compact_wy(chain)
        filters = (factor @ chain.to(factor.dtype).mT).to(x.dtype).reshape(-1, *self.patch)
        filters = filters.repeat(self.groups, *(1 for _ in self.patch))
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.border, mode=self.padding_mode), 0
        return _CONVOLVE[self.kind](x, filters, None, self.stride, padding, self.dilation, self.groups), chain

    def project(self, read: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
        """What the layer has to subtract from its output.

        Args:
            read: what `forward` gave.
            weight: `W: (out, c / groups, ...)`.

        Returns:
            `(W U) (T U^T p)` for every patch, `(n, out, ...)`.
        """
        coordinates, chain = read
        mixing = (weight.flatten(1).to(chain.dtype) @ chain).to(coordinates.dtype)
        filters = mixing.reshape(*mixing.shape, *(1 for _ in self.patch[1:]))
        return _CONVOLVE[self.kind](coordinates, filters, groups=self.groups)


class WeightReflection(Reflection):
    """Reflects the weight itself, for whoever reads it: `W -> W Q`."""

    on_weight = True

    def forward(self, weight: Tensor) -> Tensor:
        """The rotated weight, of the shape, dtype and layout that `weight` has."""
        chain = self.chain_for(weight)
        if chain is None:
            return weight
        factor = householder.compact_wy(chain)
        rotated = householder.rotate(self.rows(weight).to(factor.dtype), chain.to(factor.dtype), factor)
        return self.shaped(rotated.to(weight.dtype), weight)


def reflection_for(layer: nn.Module, *, on_weight: bool = False) -> Reflection:
    """An empty container of the form that fits a layer.

    Args:
        layer: a layer that may be a site (`hra_fx.site.find_kind`).
        on_weight: reflect its weight, and not what it is called with.

    Example:
        >>> from hra_fx.reflection import AdapterSpec
        >>> box = reflection_for(nn.Linear(6, 4))
        >>> box.add("default", AdapterSpec(r=2), nn.Linear(6, 4).weight)
        >>> box
        LinearReflection(default: d=6, r=2)
    """
    if on_weight:
        return WeightReflection(width_of(layer), kind_of(layer), columns=has_columns(layer))
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvReflection(layer)
    return LinearReflection(width_of(layer), kind_of(layer), columns=has_columns(layer))


def must_be_on_weight(layer: nn.Module) -> bool:
    """Whether the input of a layer says too little: its class has a forward of its own, or it is an attention.

    Example:
        >>> must_be_on_weight(nn.Linear(6, 4)), must_be_on_weight(nn.MultiheadAttention(4, 2))
        (False, True)
    """
    standard: list[Any] = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d]
    if has_columns(layer):
        standard = [next(kind for kind in type(layer).__mro__ if kind.__name__ == "Conv1D")]
    own: Any = original_class(layer)
    return isinstance(layer, nn.MultiheadAttention) or own.forward not in [kind.forward for kind in standard]
