"""The interface of the quantization schemes: whether a layer can be adapted, and its values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


class QuantScheme(ABC):
    """A library's quantization scheme: what hra_fx needs to know about a layer.

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

    def why_no_gradient(self, layer: nn.Module) -> str | None:
        """Return why no gradient passes a layer without an adapter."""
        return None

    def called(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Context manager in which the layer is called."""
        return nullcontext()

    @abstractmethod
    def values(self, layer: nn.Module) -> Tensor:
        """The dequantized weight, `(out, d)`, floating point."""
