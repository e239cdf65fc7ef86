"""The texts and colors of pictures and of the page. Each color role has a color for light and for dark backgrounds.

Text has a contrast of at least 4.5:1 with its background in both themes. In the dark theme, edges, and the lines and
marks of layers with and without adapters, have a contrast of at least 3:1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args
from xml.etree.ElementTree import Element

Theme: TypeAlias = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = get_args(Theme)

#: Role -> the colors on light and on dark backgrounds. `violet` is an adapter, `blue` a layer that is trained in full,
#: `red` a layer that should have an adapter but does not, and `amber` anything that is not traced.
COLORS: Mapping[str, tuple[str, str]] = {
    "paper": ("#f6f7fa", "#12161d"),
    "card": ("#ffffff", "#1b212b"),
    "ink": ("#1f2733", "#e6eaf1"),
    "faint": ("#505b6b", "#a9b4c4"),
    "rule": ("#d4dae3", "#343d4b"),
    "edge": ("#7b8798", "#7f8b9f"),
    "box-line": ("#a9b4c3", "#66738a"),
    "port": ("#eceff4", "#2a323f"),
    "port-line": ("#b4bdca", "#66738a"),
    "module": ("#eff3f8", "#161c25"),
    "module-line": ("#b3c0cf", "#5b6a80"),
    "violet": ("#43247a", "#dccdfb"),
    "violet-pale": ("#e6dcf9", "#3a2a5e"),
    "violet-line": ("#8a68cf", "#9a7fdc"),
    "amber": ("#5c430c", "#f0d79b"),
    "amber-pale": ("#fdf6e3", "#2e2818"),
    "amber-line": ("#c9a64f", "#94793a"),
    "untraced": ("#fffdf8", "#1c1a15"),
    "blue": ("#17406d", "#cfe2fa"),
    "blue-pale": ("#d8e8fb", "#1d3557"),
    "blue-line": ("#4b86c4", "#5f93cc"),
    "red": ("#a3241b", "#ffa79e"),
    "red-line": ("#cc4237", "#e0685d"),
    "skipped": ("#7b8696", "#8b97a9"),
    "focus": ("#0b63ce", "#6cb0ff"),
}
#: Widths in em of DejaVu Sans, the widest of the common sans-serif fonts, so that text fits its box in all of them.
_WIDTHS = {
    **dict.fromkeys("ijl.,:;'|! I", 0.34),
    **dict.fromkeys('frt()[]{}/-"', 0.42),
    **dict.fromkeys("mwMW@%…→", 0.97),
    **dict.fromkeys("ABCDEFGHKNOPQRSTUVXYZ&<>+=×", 0.74),
}


def colored(root: Element, theme: Theme | None) -> None:
    """Replace the names of roles in the attributes of an SVG with colors; for `None`, with properties of `as_css`."""
    for element in root.iter():
        for name in ("fill", "stroke"):
            role = element.get(name, "")
            if role in COLORS:
                element.set(name, COLORS[role][THEMES.index(theme)] if theme else f"var(--{role})")


def as_css() -> str:
    """The roles as properties of a stylesheet."""
    lines = (f"  --{role}: light-dark({on_light}, {on_dark});\n" for role, (on_light, on_dark) in COLORS.items())
    return f":root {{\n{''.join(lines)}}}\n"


def width(text: str, size: float, *, bold: bool = False) -> float:
    """An upper estimate of the width of a text, in the unit of `size`.

    >>> width("relu", 10) < width("relu", 10, bold=True) < width("ReLU", 12, bold=True)
    True
    """
    ems = sum(_WIDTHS.get(letter, 0.63 if letter < "\u0250" else 1.05) for letter in text)
    return ems * size * (1.1 if bold else 1.0)
