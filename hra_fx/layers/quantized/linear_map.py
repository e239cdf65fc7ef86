"""A linear layer of any library, such as GPTQ, AWQ, AQLM or EETQ. Only what it computes is known."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.layers.class_swap import original_class

#: Layers that round their inputs to 8 bits deviate by 3 %; layers that are not linear by much more.
_LINEAR = 0.1


class LinearMap:
    """A layer whose own forward is called. hra_fx does not need to know how it stores its weight.

    `libraries.py` has a subclass for each library that needs one.

    Attributes:
        straight_through: whether hra_fx computes the gradient of the layer's input even if the library does.
    """

    straight_through: bool = False

    def description(self, layer: nn.Module) -> str:
        """The package and the class, for messages."""
        cls = original_class(layer)
        return f"{cls.__module__.partition('.')[0]}, {cls.__name__}"

    def why_not_adapted(self, layer: Any) -> str | None:
        """Return why a layer cannot be adapted, without a final period."""
        return None

    def values(self, layer: Any) -> Tensor:
        """The dequantized weight `(out, d)`: the outputs for the unit vectors, in the dtype of the outputs."""
        found = outputs(layer, torch.eye(layer.in_features + 1, layer.in_features))
        return (found[:-1] - found[-1]).mT


class UnknownLinear(LinearMap):
    """A layer of an unknown library, which is only adapted if it turns out to be linear."""

    def why_not_adapted(self, layer: Any) -> str | None:
        """Call the layer: only if it is linear is reflecting its input the same as `W Q`."""
        if len(inspect.signature(original_class(layer).forward).parameters) != 2:
            return "its forward takes more than one input. Leave it out with exclude_modules"
        rows = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
        rows[0], rows[3] = 0, rows[1] + rows[2]
        try:
            zero, one, two, both = outputs(layer, rows).double()
            is_linear = bool((both - one - two + zero).norm() < _LINEAR * (both - zero).norm())
        except Exception as problem:  # the code of another library may raise anything
            return f"calling it with {tuple(rows.shape)} failed ({problem}). Leave it out with exclude_modules"
        if is_linear and one.shape == (layer.out_features,):
            return None
        return "its output is not linear in its input, so it has no weight to rotate. Leave it out with exclude_modules"


def outputs(layer: nn.Module, rows: Tensor) -> Tensor:
    """What a layer computes for rows without its adapters, in the dtype of its largest floating-point tensor."""
    alone: Any = object.__new__(original_class(layer))
    vars(alone).update(vars(layer))
    for held in ("_parameters", "_buffers"):  # a large bias would hide the digits of the rest
        tensors = vars(layer)[held].items()
        vars(alone)[held] = {n: torch.zeros_like(t) if n == "bias" and t is not None else t for n, t in tensors}
    largest = list(tensors_of(layer).values())
    own = next((tensor.dtype for tensor in largest if tensor.is_floating_point()), torch.float16)
    with torch.no_grad():
        found: Tensor = original_class(layer).forward(alone, rows.to(largest[0].device, own))
    return found


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's own parameters and buffers, the largest first."""
    found = {name: t for held in (layer._parameters, layer._buffers) for name, t in held.items() if t is not None}
    return dict(sorted(found.items(), key=lambda item: -item[1].nbytes))
