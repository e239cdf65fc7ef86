"""The texts and colors of pictures and of the page. Each role has a color for light and for dark backgrounds.

Text has a contrast of at least 4.5:1 with its background in both. On dark backgrounds, edges, and the lines and marks
of layers with and without adapters, have a contrast of at least 3:1.
"""

from __future__ import annotations

from collections.abc import Mapping

#: The colors of a heatmap from small to large values, on light and on dark backgrounds: parts of matplotlib's magma, in
#: which large values stand out. The order is visible with every kind of color blindness, and in black and white prints.
HEAT: tuple[tuple[str, str], ...] = (
    ("#fcf7b9", "#ca3e72"),
    ("#fdd69a", "#d6456c"),
    ("#feb67f", "#e24e66"),
    ("#fc9468", "#ed5a60"),
    ("#f6725f", "#f4675d"),
    ("#e75763", "#f8785e"),
    ("#d2426e", "#fb8862"),
    ("#b43779", "#fd9869"),
    ("#972c7e", "#fea874"),
    ("#7b2281", "#feb97f"),
    ("#5f177f", "#fec88c"),
    ("#431270", "#fdd99b"),
    ("#280e55", "#fde8aa"),
    ("#0e0b2b", "#fcf7b9"),
)
#: Role -> the colors on light and on dark backgrounds. `violet` is an adapter, `blue` a layer that is trained in full,
#: `red` a layer that should have an adapter but does not, and `unknown` a change that could not be computed.
COLORS: Mapping[str, tuple[str, str]] = {
    "card": ("#ffffff", "#1b212b"),
    "ink": ("#1f2733", "#e6eaf1"),
    "faint": ("#505b6b", "#a9b4c4"),
    "edge": ("#7b8798", "#7f8b9f"),
    "line": ("#a9b4c3", "#66738a"),
    "port": ("#eceff4", "#2a323f"),
    "module": ("#eff3f8", "#161c25"),
    "violet": ("#43247a", "#dccdfb"),
    "violet-pale": ("#e6dcf9", "#3a2a5e"),
    "violet-line": ("#8a68cf", "#9a7fdc"),
    "blue": ("#17406d", "#cfe2fa"),
    "blue-pale": ("#d8e8fb", "#1d3557"),
    "blue-line": ("#4b86c4", "#5f93cc"),
    "red-line": ("#cc4237", "#e0685d"),
    "unknown": ("#c9ced6", "#4a5362"),
    **{f"heat{step}": pair for step, pair in enumerate(HEAT)},
}
#: Widths in em of DejaVu Sans, the widest of the common sans-serif fonts, so that text fits its box in all of them.
_WIDTHS = {
    **dict.fromkeys("ijl.,:;'|! I", 0.34),
    **dict.fromkeys('frt()[]{}/-"', 0.42),
    **dict.fromkeys("mwMW@%…→", 0.97),
    **dict.fromkeys("ABCDEFGHKNOPQRSTUVXYZ&<>+=×", 0.74),
}


def dark_rules(text: str) -> str:
    """The style rules that show the pictures in a text in the dark theme, if the reader's system has one."""
    rules = [
        f'[{name}="{light}"]{{{name}:{dark}}}'
        for light, dark in COLORS.values()
        for name in ("fill", "stroke")
        if f'{name}="{light}"' in text
    ]
    return f"@media screen and (prefers-color-scheme:dark){{{''.join(rules)}}}"


def width(text: str, size: float, *, bold: bool = False) -> float:
    """An upper estimate of the width of a text, in the unit of `size`.

    >>> width("relu", 10) < width("relu", 10, bold=True) < width("ReLU", 12, bold=True)
    True
    """
    ems = sum(_WIDTHS.get(letter, 0.63 if letter < "\u0250" else 1.05) for letter in text)
    return ems * size * (1.1 if bold else 1.0)
