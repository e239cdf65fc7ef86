"""One model of the zoo: how it is built, and with what it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

#: Positional and keyword arguments of one call.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A model, tiny and with random weights.

    Attributes:
        name: `"<library>/<model>"`, by which the table and the tests know it.
        build: makes the model, in any mode; the caller seeds torch before it. Nothing is downloaded.
        call: `call(batch, size)` makes the inputs; `size` 0 is the usual one (image size, length), 1 another that the
            model accepts. Seeded by the caller too. Floating inputs are float32.
        sizes: how many sizes the model accepts: 1 for one whose input size is fixed.
        batches: the batch sizes to try; the second is the other one.
        double: whether to try float64; a model that is slow in it says no.
        parameters: ends of the names of 3-D parameters of experts that are adapted too.
    """

    name: str
    build: Callable[[], nn.Module]
    call: Callable[[int, int], Call]
    sizes: int = 2
    batches: tuple[int, int] = (2, 3)
    double: bool = True
    parameters: tuple[str, ...] = ()
