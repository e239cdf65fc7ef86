"""The colour of text on another colour."""

from __future__ import annotations


def ink_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever is read better on a colour; the contrast is 4.5 at least (WCAG 2).

    >>> ink_on((1.0, 1.0, 1.0)), ink_on((0.0, 0.13, 0.3))
    ('black', 'white')
    """
    return "black" if (luminance(colour) + 0.05) / 0.05 >= 1.05 / (luminance(colour) + 0.05) else "white"


def luminance(colour: tuple[float, ...]) -> float:
    """The relative luminance of WCAG 2 of red, green and blue from 0 to 1.

    >>> luminance((1.0, 1.0, 1.0))
    1.0
    """
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
