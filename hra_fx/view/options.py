"""The options of a picture: depth, focus, heat and theme."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from hra_fx.errors import VisualizeError
from hra_fx.reporting.heat import HEATS
from hra_fx.view.theme import THEMES, Theme


@dataclass(frozen=True)
class Options:
    """The options of a picture.

    Attributes:
        depth: number of module levels that are open: with 0 the children of the model are closed, with 1 they show
            their children. `None` leaves it to the format.
        focus: qualified name of the module that is drawn, `None` for the model.
        heat: the measure that colors adapted layers, a key of `reporting.heat.HEATS`; `None` for the change of the
            weight.
        theme: `"light"` or `"dark"`; `None` leaves it to the format.

    Raises:
        VisualizeError: an option has the wrong type or value.

    >>> Options(theme="sepia")
    Traceback (most recent call last):
        ...
    hra_fx.errors.VisualizeError: `theme` must be one of 'light', 'dark', got 'sepia'.
    """

    depth: int | None = None
    focus: str | None = None
    heat: str | None = None
    theme: Theme | None = None

    def __post_init__(self) -> None:
        """Check each field."""
        if self.depth is not None:
            object.__setattr__(self, "depth", _levels(self.depth))
        if self.focus is not None and not isinstance(self.focus, str):
            raise VisualizeError(
                f"`focus` must be a module's name as in model.named_modules(), got {type(self.focus).__name__}."
            )
        _choice("heat", self.heat, tuple(HEATS))
        _choice("theme", self.theme, THEMES)


def _choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value is not None and (not isinstance(value, str) or value not in choices):
        raise VisualizeError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _levels(depth: object) -> int:
    """A number of levels as an int. Integers of numpy are accepted, bools and floats are not."""
    try:
        number = -1 if isinstance(depth, bool) else operator.index(depth)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise VisualizeError(f"`depth` must be a non-negative int or None, got {depth!r}.")
    return number
