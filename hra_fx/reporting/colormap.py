"""The colours of heat: from pale to dark, for whatever draws how far a layer was turned.

They are a part of matplotlib's magma, reversed, so that their order survives every kind of colour blindness and a black
and white print. What nothing turned is palest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Colours at equal steps from 0 to the top of the legend; between them the three channels are interpolated linearly.
PALETTE = ("#fcf7b9", "#fec88c", "#fd9869", "#f4675c", "#d8456c", "#ae347b", "#842681", "#5c167f", "#331067", "#0e0b2b")
#: The colour of a value that could not be computed.
UNKNOWN = "#c9ced6"


def colour(value: float, top: float) -> str:
    """The colour of a value on a scale from 0 to `top`.

    >>> colour(0.0, 10.0), colour(10.0, 10.0), colour(float("nan"), 10.0)
    ('#fcf7b9', '#0e0b2b', '#c9ced6')
    """
    if math.isnan(value):
        return UNKNOWN
    place = min(max(value / top, 0.0), 1.0) * (len(PALETTE) - 1)
    index = min(int(place), len(PALETTE) - 2)
    low, high = (_channels(PALETTE[index + end]) for end in (0, 1))
    mixed = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def ink_on(fill: str) -> str:
    """Black or white, whichever is easier to read on a colour: the contrast is 4.5:1 or better on every one.

    >>> ink_on("#fcf7b9"), ink_on("#0e0b2b")
    ('#000000', '#ffffff')
    """
    return "#000000" if (_luminance(fill) + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def _channels(fill: str) -> Sequence[int]:
    return [int(fill[start : start + 2], 16) for start in (1, 3, 5)]


def _luminance(fill: str) -> float:
    """Relative luminance (https://www.w3.org/TR/WCAG22/#dfn-relative-luminance)."""
    shares = [channel / 255 for channel in _channels(fill)]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
