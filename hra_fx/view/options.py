"""What a reader may ask of a picture: how deep, of which part, in which colors."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from hra_fx.errors import VisualizeError
from hra_fx.reporting.heat import heat_named


@dataclass(frozen=True)
class Options:
    """What is asked of a picture.

    Attributes:
        depth: how many levels of modules are opened: with 0 the children of the model are closed boxes, with 1 they
            show their children. `None` leaves it to the format.
        focus: qualified name of the module that is drawn, with what enters and leaves it; `None` for the model.
        heat: what the colors of adapted layers tell, one of `reporting.heat.HEATS`; `None` for no colors.

    Raises:
        VisualizeError: a depth that is no number of levels, a focus that is no name, or an unknown heat.

    >>> Options(heat="color")
    Traceback (most recent call last):
        ...
    hra_fx.errors.VisualizeError: heat: 'color' is not one of 'mean_angle', 'angle', 'rotation', 'share'.
    """

    depth: int | None = None
    focus: str | None = None
    heat: str | None = None

    def __post_init__(self) -> None:
        """Check each field."""
        if self.depth is not None:
            object.__setattr__(self, "depth", _levels(self.depth))
        if self.focus is not None and not isinstance(self.focus, str):
            raise VisualizeError(
                f"focus: {self.focus!r} is {type(self.focus).__name__}, no name of a module. "
                "Give its path, as model.named_modules() does."
            )
        if self.heat is not None:
            heat_named(self.heat)


def _levels(depth: object) -> int:
    """A number of levels as a plain int; numpy's integers are welcome, True and 1.0 are slips."""
    try:
        number = -1 if isinstance(depth, bool) else operator.index(depth)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise VisualizeError(
            f"depth: {depth!r} is no number of levels. Give 0 (the model's children closed), 1, 2 ..., or None."
        )
    return number
