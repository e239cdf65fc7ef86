"""Text in a picture: how wide it comes out, how it is shortened, which characters an SVG file may hold."""

from __future__ import annotations

import re

#: Widths in em, for the widest of the usual sans-serif fonts (DejaVu Sans), so that no text leaves its box.
_WIDTHS = {
    **dict.fromkeys("ijl.,:;'|! I", 0.34),
    **dict.fromkeys('frt()[]{}/-"', 0.42),
    **dict.fromkeys("mwMW@%…→", 0.97),
    **dict.fromkeys("ABCDEFGHKNOPQRSTUVXYZ&<>+=×", 0.74),
}
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """The text with what XML cannot hold replaced, and line breaks as spaces.

    >>> clean("a\\x00b\\nc")
    'a\\ufffdb c'
    """
    return re.sub(r"\s", " ", _ILLEGAL.sub("\ufffd", text))


def width(text: str, size: float, *, bold: bool = False) -> float:
    """Upper estimate of the width of a text, in the unit of `size`.

    >>> width("relu", 10) < width("relu", 10, bold=True) < width("ReLU", 12, bold=True)
    True
    """
    ems = sum(_WIDTHS.get(letter, 0.63 if letter < "\u0250" else 1.05) for letter in text)
    return ems * size * (1.1 if bold else 1.0)


def shorten(text: str, letters: int) -> str:
    """At most so many letters, with the middle left out.

    >>> shorten("scaled_dot_product_attention", 16)
    'scaled_d…tention'
    """
    if len(text) <= letters:
        return text
    tail = (letters - 1) // 2
    return f"{text[: letters - 1 - tail]}…{text[len(text) - tail :]}"
