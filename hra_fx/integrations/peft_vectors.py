"""A PEFT layer's vectors in a container of hra_fx, so that the layer runs the code of adapted layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hra_fx.functional.chain import plain_chain
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters
from hra_fx.layers.target import kind_of, width_of
from hra_fx.layers.variants import ConvAdapters, LinearAdapters


class _PeftVectors(HouseholderAdapters):
    """Reads the vectors of PEFT's layer at each use: loading, FSDP and `to_empty` replace parameters.

    It holds no parameter itself, and it is not a child of the layer, so names and states stay PEFT's.
    """

    def read(self, layer: Any) -> None:
        """Take the adapters of PEFT's layer."""
        # Not by setattr, which would register them as children.
        vars(self)["source"], vars(self)["base_layer"] = layer.hra_u, layer.get_base_layer()
        self.specs = {name: AdapterSpec(r, layer.hra_apply_GS[name]) for name, r in layer.hra_r.items()}

    def __getitem__(self, name: str) -> Any:
        return vars(self)["source"][name]

    def weight_of(self, layer: nn.Module) -> nn.Parameter:
        """The base weight."""
        weight: nn.Parameter = vars(self)["base_layer"].weight
        return weight

    def unit_chain(self, name: str, *, reverse: bool = False) -> Tensor:
        """The reflections of an adapter, `(d, r)`, in float64 (float32 on MPS); `reverse` gives those of `Q^T`."""
        vectors = self._held(name)
        wide = vectors.float() if vectors.device.type == "mps" else vectors.double()
        chain = plain_chain(wide, None, apply_GS=self.specs[name].apply_GS)
        return chain.flip(-1) if reverse else chain


class PeftLinearAdapters(_PeftVectors, LinearAdapters):
    """The adapters of `peft.tuners.hra.layer.HRALinear`."""


class PeftConvAdapters(_PeftVectors, ConvAdapters):
    """The adapters of `peft.tuners.hra.layer.HRAConv2d`."""


class Site(nn.Module):
    """Represents a PEFT layer when factors are computed: a module whose child `hra_u` is a container of hra_fx."""

    hra_u: PeftLinearAdapters | PeftConvAdapters

    def __init__(self, layer: Any) -> None:
        """Represent an `HRALinear` or `HRAConv2d` with its current adapters; none is active."""
        super().__init__()
        base = layer.get_base_layer()
        is_conv = isinstance(base, nn.Conv2d)
        self.hra_u = PeftConvAdapters(base) if is_conv else PeftLinearAdapters(width_of(base), kind_of(base))
        self.hra_u.read(layer)
