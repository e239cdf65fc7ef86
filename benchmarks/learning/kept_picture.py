"""The picture of what each method keeps: a panel for each corpus, a numbered point for each method, and a legend."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from learning.kept import FACTS, ROWS, TALES, TWEETS, Row, step_time
from learning.records import Record
from learning.summary import half_interval, value
from learning.table import label

PANELS: dict[str, Callable[[Record], float]] = {
    "tales, perplexity": lambda run: run.retention[TALES],
    "tweets, perplexity": lambda run: run.retention[TWEETS],
    "facts that are lost, %": lambda run: 100 - run.retention[FACTS],
}
PANEL, GAP, TOP, BOTTOM, LEGEND, RADIUS = 230, 46, 34, 44, 300, 7.5
#: The right end of the axis of the new posts, relative to the left one. Points beyond it are at the edge.
WIDEST = 1.2
HEIGHT = TOP + PANEL + BOTTOM
#: Colors of the page, text, lines, and of the families of methods.
LIGHT = {
    "page": "#ffffff",
    "text": "#1f2733",
    "line": "#d4dae3",
    "lora": "#b4530a",
    "hra": "#1d5fc4",
    "full": "#5d6673",
}
DARK = {"page": "#0d1117", "text": "#d8dee9", "line": "#30363d", "lora": "#f0883e", "hra": "#6cb0ff", "full": "#9aa4b2"}


@dataclass(frozen=True)
class Point:
    """A method: its number, label and family, and the mean and half of the interval of each panel and the new posts."""

    number: int
    label: str
    family: str
    x: tuple[float, float]
    y: tuple[tuple[float, float], ...]


def kept_picture(records: Sequence[Record], colors: dict[str, str]) -> str:
    """An SVG document."""
    points = points_of(records)
    width = len(PANELS) * (PANEL + GAP) + LEGEND
    lowest, highest = limits([point.x for point in points])
    xs = lowest, min(highest, WIDEST * lowest)
    parts = [f'<rect width="{width}" height="{HEIGHT}" fill="{colors["page"]}"/>']
    for place, name in enumerate(PANELS):
        left = GAP + place * (PANEL + GAP)
        ys = limits([point.y[place] for point in points])
        parts += axes(left, name, xs, ys, colors)
        for point in reversed(points):  # the first ones are on top
            parts += marked(point, point.y[place], left, xs, ys, colors)
    left = GAP + len(PANELS) * (PANEL + GAP)
    parts.append(text(left - 6, TOP - 14, "time of a step, LoRA = 1", colors["text"], 10.5, "start"))
    for place, point in enumerate(points):
        y = TOP + 6 + place * (PANEL + BOTTOM - 20) / max(len(points) - 1, 1)
        parts += dot(point, left - 20, y, colors)
        parts.append(text(left - 6, y + 3.5, point.label, colors["text"], 10.5, "start"))
    size = f'width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}"'
    font = "font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif\""
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>\n' + "\n".join(parts) + "\n</svg>\n"


def points_of(records: Sequence[Record]) -> list[Point]:
    """The methods of the picture that ran. The model before training has no score on the new posts to compare."""
    points: list[Point] = []
    for row in ROWS:
        runs = row.runs(records)
        if row.in_picture and runs and row.method != "base":
            values = [spread([value(run) for run in runs])]
            values += [spread([of(run) for run in runs]) for of in PANELS.values()]
            name = f"{name_of(row)}, {step_time(records, runs):.1f}×"
            points.append(Point(len(points) + 1, name, family(row), values[0], tuple(values[1:])))
    return points


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its interval."""
    return statistics.fmean(values), half_interval(values)


def name_of(row: Row) -> str:
    """The name in the legend."""
    rate = f" at {row.lr:g}" if row.trained == "full" else ""
    return label(row.method).replace("full fine-tuning", f"full fine-tuning{rate}").replace("HRA, pairs", "HRA")


def family(row: Row) -> str:
    """HRA, full fine-tuning, or other adapters."""
    return next((name for name in ("hra", "full") if row.method.startswith(name)), "lora")


def limits(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The range of an axis, with space around the means."""
    low, high = min(mean for mean, _ in values), max(mean for mean, _ in values)
    space = 0.09 * (high - low or 1.0)
    return low - space, high + space


def axes(left: float, name: str, xs: tuple[float, float], ys: tuple[float, float], colors: dict[str, str]) -> list[str]:
    """The frame, the ticks and the title of a panel."""
    parts = [text(left, TOP - 14, name, colors["text"], 12, "start", 600)]
    for at in ticks(*xs):
        x = left + PANEL * (at - xs[0]) / (xs[1] - xs[0])
        parts.append(line(x, TOP, x, TOP + PANEL, colors["line"]))
        parts.append(text(x, TOP + PANEL + 14, f"{at:g}", colors["text"], 10, "middle"))
    for at in ticks(*ys):
        y = TOP + PANEL - PANEL * (at - ys[0]) / (ys[1] - ys[0])
        parts.append(line(left, y, left + PANEL, y, colors["line"]))
        parts.append(text(left - 5, y + 3.5, f"{at:g}", colors["text"], 10, "end"))
    parts.append(text(left + PANEL / 2, TOP + PANEL + 32, "new posts, perplexity", colors["text"], 10.5, "middle"))
    return parts


def ticks(low: float, high: float) -> list[float]:
    """Round values in a range, at most seven."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if (high - low) / step <= 7)
    return [step * place for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def marked(
    point: Point,
    height: tuple[float, float],
    left: float,
    xs: tuple[float, float],
    ys: tuple[float, float],
    colors: dict[str, str],
) -> list[str]:
    """A numbered point with its intervals, which end at the frame."""

    def place(low: float, high: float, at: float) -> float:
        return PANEL * min(max((at - low) / (high - low), 0.0), 1.0)

    (x, dx), (y, dy) = point.x, height
    across = [left + place(*xs, at) for at in (x - dx, x, x + dx)]
    up = [TOP + PANEL - place(*ys, at) for at in (y - dy, y, y + dy)]
    color = colors[point.family]
    bars = [line(across[0], up[1], across[2], up[1], color), line(across[1], up[0], across[1], up[2], color)]
    beyond = [text(across[1] - RADIUS - 2, up[1] + 3.5, f"{x:.0f} →", color, 9, "end")] if x > xs[1] else []
    return [*(bars if dx or dy else []), *dot(point, across[1], up[1], colors), *beyond]


def dot(point: Point, x: float, y: float, colors: dict[str, str]) -> list[str]:
    """A disk with a number."""
    page, color = colors["page"], colors[point.family]
    disk = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="{color}" stroke="{page}"/>'
    return [disk, text(x, y + 3.2, str(point.number), page, 9, "middle", 600)]


def line(x0: float, y0: float, x1: float, y1: float, color: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{color}"/>'


def text(x: float, y: float, words: str, color: str, size: float, anchor: str, weight: int = 400) -> str:
    style = f'fill="{color}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(words)}</text>'
