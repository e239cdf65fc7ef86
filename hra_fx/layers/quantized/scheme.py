"""What has to be known of a quantised Linear: reflections of its input do without its weight, all else needs this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn


class Requantized(NamedTuple):
    """A weight that was quantised anew.

    Attributes:
        weight: a parameter to put in place of the layer's.
        values: what it stands for, `(out, d)`.
    """

    weight: nn.Parameter
    values: Tensor


class QuantScheme(ABC):
    """One way in which a library keeps the weight of a Linear; without state, for any layer kept in that way.

    Attributes:
        kind: the class whose forward is the library's own, as far as reflections are concerned.
        straight_through: whether the gradient of the layer's input is to be made here, for the library passes none.
    """

    kind: type[nn.Module] = nn.Linear
    straight_through: bool = False

    @abstractmethod
    def words(self, layer: nn.Module) -> str:
        """Library and scheme, for messages."""

    def why_not_adapted(self, layer: nn.Module) -> str | None:
        """Why a layer cannot carry reflections, if it cannot; without a full stop."""
        return None

    def why_not_requantized(self, layer: nn.Module) -> str | None:
        """Why its weight cannot be quantised anew, if it cannot; without a full stop."""
        return None

    def why_no_gradient(self, layer: nn.Module) -> str | None:
        """Why no gradient passes a layer that has no reflections, if it does not; without a full stop."""
        return None

    def called(self, layer: nn.Module) -> AbstractContextManager[None]:
        """A block in which the layer is called."""
        return nullcontext()

    @abstractmethod
    def values(self, layer: nn.Module) -> Tensor:
        """The weight, dequantised: `(out, d)`, floating."""

    @abstractmethod
    def repacked(self, layer: nn.Module, rows: Tensor) -> Requantized:
        """Other values `(out, d)` in the very scheme of a layer, which is not changed."""

    def put(self, layer: Any, weight: nn.Parameter) -> None:
        """Give a layer a weight of `repacked`."""
        layer._parameters["weight"] = weight
