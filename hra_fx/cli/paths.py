"""Sort paths of layers by their numbers, and group those that differ only in a number."""

from __future__ import annotations

import re


def natural(path: str) -> list[tuple[int, int, str]]:
    """A sort key that compares numbers as numbers.

    >>> sorted(["h.10.q", "h.2.q"], key=natural)
    ['h.2.q', 'h.10.q']
    """
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]


def starred(path: str) -> str:
    """The path with stars instead of numbers.

    >>> starred("h.10.q")
    'h.*.q'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)
