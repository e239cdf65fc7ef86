"""Records as columns, so that a page with ten thousand boxes is small and loads fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from hra_fx.view.text import clean

#: A column: all values, or if most have the default, the indices and values of the others.
Column: TypeAlias = "list[Any] | dict[str, list[Any]]"


class Texts:
    """A table of distinct texts; other data have their indices. The empty text is 0.

    >>> texts = Texts()
    >>> [texts.number(text) for text in ("", "conv", "relu", "conv")], texts.shown()
    ([0, 1, 2, 1], ['', 'conv', 'relu'])
    """

    def __init__(self) -> None:
        """Start with the empty text."""
        self._numbers: dict[str, int] = {"": 0}

    def number(self, text: str) -> int:
        """The index of a text."""
        return self._numbers.setdefault(text, len(self._numbers))

    def numbers(self, texts: Sequence[str]) -> list[int]:
        """The indices of several texts."""
        return [self.number(text) for text in texts]

    def shown(self) -> list[str]:
        """The texts by index, with characters that XML does not allow replaced."""
        return [clean(text) for text in self._numbers]


def column(values: Sequence[Any]) -> Column:
    """One column; `0`, `False` and empty lists are defaults.

    >>> column([4, 5, 0]), column([0, 0, 0, 7])
    ([4, 5, 0], {'at': [3], 'values': [7]})
    """
    at = [index for index, value in enumerate(values) if value]
    if 2 * len(at) >= len(values):
        return list(values)
    return {"at": at, "values": [values[index] for index in at]}


def columns(records: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """The columns of records; missing values are `0`.

    >>> columns([{"r": 4}, {"r": 8, "d": 2}])
    {'r': [4, 8], 'd': [0, 2]}
    """
    names = dict.fromkeys(name for record in records for name in record)
    return {name: column([record.get(name, 0) for record in records]) for name in names}
