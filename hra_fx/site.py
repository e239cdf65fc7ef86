"""What a *site* is: one Linear or Conv2d, by identity, whose weight is rotated. Shared by every pass and by the API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

SiteKind: TypeAlias = Literal["linear", "conv2d"]
SiteLayer: TypeAlias = nn.Linear | nn.Conv2d

#: Name of the child module that owns a site's reflections, hence of its `state_dict` keys (PEFT's name).
REFLECTION = "hra_u"
#: Name of the child module that holds an adapter's copies of tensors while they are not in place.
SAVED = "hra_saved"
#: Key of `torch.fx.Node.meta` under which the passes keep a `SiteNote`.
META = "hra"


@dataclass(frozen=True)
class SiteNote:
    """The mark that the passes leave on a node, in `node.meta["hra"]`.

    Attributes:
        path: the layer's qualified name in the whole model.
        kind: `"linear"` or `"conv2d"`.
        role: `"layer"` for the call of the layer, `"reflection"` for the call of its `hra_u` container.
    """

    path: str
    kind: SiteKind
    role: Literal["layer", "reflection"]


def kind_of(layer: nn.Module) -> SiteKind:
    """The kind of a site's layer.

    Raises:
        TypeError: neither Linear nor Conv2d.

    Example:
        >>> kind_of(nn.Conv2d(3, 8, 3))
        'conv2d'
    """
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.Conv2d):
        return "conv2d"
    raise TypeError(f"{type(layer).__name__} is neither Linear nor Conv2d")


def width_of(layer: SiteLayer) -> int:
    """The length `d` of a site's reflection vectors: one row of the weight, flattened.

    Example:
        >>> width_of(nn.Conv2d(8, 16, (3, 5), groups=2))
        60
    """
    return layer.weight[0].numel()


def describe(layer: nn.Module) -> str:
    """A few words for tables and errors.

    Example:
        >>> describe(nn.Conv2d(8, 16, (3, 5), groups=2))
        'Conv2d 8->16 3x5, groups 2'
    """
    if isinstance(layer, nn.Linear):
        return f"Linear {layer.in_features}->{layer.out_features}"
    if not isinstance(layer, nn.Conv2d):
        return type(layer).__name__
    size = "x".join(map(str, layer.kernel_size))
    groups = f", groups {layer.groups}" if layer.groups > 1 else ""
    return f"Conv2d {layer.in_channels}->{layer.out_channels} {size}{groups}"
