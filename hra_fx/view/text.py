"""Text in a picture: its width, shortening, and the characters that XML allows."""

from __future__ import annotations

import re

#: Widths in em of DejaVu Sans, the widest of the common sans-serif fonts, so that text fits its box in all of them.
_WIDTHS = {
    **dict.fromkeys("ijl.,:;'|! I", 0.34),
    **dict.fromkeys('frt()[]{}/-"', 0.42),
    **dict.fromkeys("mwMW@%…→", 0.97),
    **dict.fromkeys("ABCDEFGHKNOPQRSTUVXYZ&<>+=×", 0.74),
}
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """The text with characters that XML does not allow replaced, and line breaks as spaces.

    >>> clean("a\\x00b\\nc")
    'a\\ufffdb c'
    """
    return text if text.isprintable() else re.sub(r"\s", " ", _ILLEGAL.sub("\ufffd", text))


def width(text: str, size: float, *, bold: bool = False) -> float:
    """Upper estimate of the width of a text, in the unit of `size`.

    >>> width("relu", 10) < width("relu", 10, bold=True) < width("ReLU", 12, bold=True)
    True
    """
    ems = sum(_WIDTHS.get(letter, 0.63 if letter < "\u0250" else 1.05) for letter in text)
    return ems * size * (1.1 if bold else 1.0)


def shorten(text: str, letters: int) -> str:
    """A text with at most `letters` characters, with the middle left out.

    >>> shorten("scaled_dot_product_attention", 16)
    'scaled_d…tention'
    """
    if len(text) <= letters:
        return text
    tail = (letters - 1) // 2
    return f"{text[: letters - 1 - tail]}…{text[len(text) - tail :]}"
