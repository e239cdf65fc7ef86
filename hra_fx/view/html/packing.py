"""Records as columns: a page with ten thousand boxes stays small, and is read at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from hra_fx.view.text import clean

#: A column: every value, or where it seldom differs from its default, the places where it does and the values there.
Column: TypeAlias = "list[Any] | dict[str, list[Any]]"


class Texts:
    """Every text once; elsewhere its number. The empty text is 0.

    >>> texts = Texts()
    >>> [texts.number(text) for text in ("", "conv", "relu", "conv")], texts.shown()
    ([0, 1, 2, 1], ['', 'conv', 'relu'])
    """

    def __init__(self) -> None:
        """Begin with the empty text."""
        self._numbers: dict[str, int] = {"": 0}

    def number(self, text: str) -> int:
        """The number of a text."""
        return self._numbers.setdefault(text, len(self._numbers))

    def numbers(self, texts: Sequence[str]) -> list[int]:
        """The numbers of several texts."""
        return [self.number(text) for text in texts]

    def shown(self) -> list[str]:
        """The texts by number, with characters that no file should hold replaced."""
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
    """The columns of records; what a record lacks is `0`.

    >>> columns([{"r": 4}, {"r": 8, "d": 2}])
    {'r': [4, 8], 'd': [0, 2]}
    """
    names = dict.fromkeys(name for record in records for name in record)
    return {name: column([record.get(name, 0) for record in records]) for name in names}
