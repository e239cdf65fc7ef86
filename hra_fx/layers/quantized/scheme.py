"""The interface of the quantization schemes: whether a layer can be adapted, its values, and how to quantize again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn


class Requantized(NamedTuple):
    """A weight that was quantized again.

    Attributes:
        weight: a parameter that replaces the layer's weight.
        values: the dequantized values, `(out, d)`.
    """

    weight: nn.Parameter
    values: Tensor


class QuantScheme(ABC):
    """A library's quantization scheme: reads the values of a layer, and quantizes other values in the same way.

    Methods with `why` return the reason as text without a final period, or `None`.

    Attributes:
        cls: the class with the library's own forward.
        straight_through: whether hra_fx computes the gradient of the layer's input, because the library does not.
    """

    straight_through: bool = False

    def __init__(self, cls: type[nn.Module]) -> None:
        """Create the scheme of all layers of a class."""
        self.cls = cls

    @abstractmethod
    def description(self, layer: nn.Module) -> str:
        """The library and the scheme, for messages."""

    def why_not_adapted(self, layer: nn.Module) -> str | None:
        """Return why a layer cannot be adapted."""
        return None

    def why_not_requantized(self, layer: nn.Module) -> str | None:
        """Return why its weight cannot be quantized again."""
        return None

    def why_no_gradient(self, layer: nn.Module) -> str | None:
        """Return why no gradient passes a layer without an adapter."""
        return None

    def called(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Context manager in which the layer is called."""
        return nullcontext()

    @abstractmethod
    def values(self, layer: nn.Module) -> Tensor:
        """The dequantized weight, `(out, d)`, floating point."""

    @abstractmethod
    def requantized(self, layer: nn.Module, rows: Tensor) -> Requantized:
        """Quantize other values `(out, d)` like the weight of a layer. The layer is not changed."""

    def put(self, layer: Any, weight: nn.Parameter) -> None:
        """Set a weight from `requantized` on a layer."""
        layer._parameters["weight"] = weight
