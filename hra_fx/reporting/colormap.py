"""The color scales of pictures and plots: parts of matplotlib's magma.

On light pages it goes from pale (little) to dark (much), on dark pages from purple to pale, so that much stands out on
both. The order is visible with every kind of color blindness and in black and white prints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Colors at equal steps of the scale; between them the channels are interpolated linearly.
PALETTE = ("#fcf7b9", "#fec88c", "#fd9869", "#f4675c", "#d8456c", "#ae347b", "#842681", "#5c167f", "#331067", "#0e0b2b")
#: The same for dark pages. Each has a contrast of at least 3:1 with the boxes there.
DARK_PALETTE = (
    *("#ca3e72", "#dc4869", "#ec5860", "#f66c5c", "#fb8560"),
    *("#fd9b6b", "#feb47b", "#feca8d", "#fde2a3", "#fcf7b9"),
)
#: The color of a value that could not be computed.
UNKNOWN = "#c9ced6"


def color(value: float, ends: tuple[float, float], palette: Sequence[str] = PALETTE) -> str:
    """The color of a value on a scale with these ends.

    >>> color(5.0, (5.0, 10.0)), color(10.0, (5.0, 10.0)), color(float("nan"), (5.0, 10.0))
    ('#fcf7b9', '#0e0b2b', '#c9ced6')
    """
    if math.isnan(value):
        return UNKNOWN
    share = (value - ends[0]) / (ends[1] - ends[0])
    place = min(max(share, 0.0), 1.0) * (len(palette) - 1)
    index = min(int(place), len(palette) - 2)
    low, high = (_channels(palette[index + end]) for end in (0, 1))
    mixed = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def ink_on(fill: str) -> str:
    """Black or white, whichever has the higher contrast on a color (at least 4.5:1).

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
