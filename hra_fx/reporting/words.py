"""Short texts and plain values for tables, pictures and the command line. This file does not import torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any


def counted(number: int, noun: str) -> str:
    """Format a number with a noun.

    >>> counted(1, "layer"), counted(2000, "layer")
    ('1 layer', '2,000 layers')
    """
    return f"{number:,} {noun}" + "s" * (number != 1)


def shorten(text: str, letters: int) -> str:
    """Shorten a text to at most `letters` characters, by leaving out the middle.

    >>> shorten("scaled_dot_product_attention", 16)
    'scaled_d…tention'
    """
    if len(text) <= letters:
        return text
    tail = (letters - 1) // 2
    return f"{text[: letters - 1 - tail]}…{text[len(text) - tail :]}"


def plain(value: Any) -> Any:
    """Convert dataclasses, paths, sets and tuples to plain values, and numbers that are not finite to `None`.

    >>> plain({"a": (1.5, float("nan")), "b": {"z", "y"}})
    {'a': [1.5, None], 'b': ['y', 'z']}
    """
    return json.loads(json.dumps(value, default=_convert), parse_constant=lambda name: None)


def _convert(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else sorted(value)  # type: ignore[arg-type]
