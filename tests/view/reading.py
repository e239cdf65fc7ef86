"""Read what `visualize` writes: the boxes of pictures, their places and texts, and the links of a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

SINGLE = ("adapted_layer", "plain", "eager", "trained", "closed", "port")
_VALUE = re.compile(r" · (unknown|[\d.]+[%°])$")


@dataclass
class Box:
    """A box: its element, its kind, and the place of its frame."""

    element: Element
    kind: str
    x: float
    y: float
    wide: float
    high: float

    def texts(self) -> list[str]:
        """Its texts, without those of boxes in it."""
        return [" ".join(text.itertext()) for text in self.element.findall("text")]

    def tip(self) -> list[str]:
        return (self.element.findtext("title") or "").split("\n")

    def inside(self, x: float, y: float) -> bool:
        return self.x + 0.1 < x < self.x + self.wide - 0.1 and self.y + 0.1 < y < self.y + self.high - 0.1


def svg_of(file: Path) -> Element:
    """The picture in a file, with tags without a namespace."""
    return ElementTree.fromstring(file.read_text(encoding="utf-8").replace(' xmlns="http://www.w3.org/2000/svg"', ""))


def pictures_of(file: Path) -> dict[str, Element]:
    """The pictures of a page by address."""
    text = file.read_text(encoding="utf-8")
    figures = re.findall(r"<figure .*?</figure>", text, re.DOTALL)
    found = [ElementTree.fromstring(figure) for figure in figures]
    return {figure.get("id", ""): figure for figure in found}


def boxes(root: Element) -> list[Box]:
    found = []
    for element in root.iter():
        frame = next((part for part in element.findall("rect") if part.get("class") == "frame"), None)
        if frame is not None:
            place = (float(frame.get(name, "nan")) for name in ("x", "y", "width", "height"))
            found.append(Box(element, element.get("class", ""), *place))
    return found


def box_named(root: Element, name: str) -> Box:
    """The box with a name as its first text, or after the text of its adapter."""
    return next(box for box in boxes(root) if any(re.match(rf"{re.escape(name)}\b", text) for text in box.texts()))


def adapted_paths(root: Element) -> list[str]:
    """The adapted layers in the tooltips of boxes that are not opened, without their values."""
    shown = [box for box in boxes(root) if box.kind in SINGLE]
    return [_VALUE.sub("", line) for box in shown for line in box.tip()]


def shapes(root: Element) -> list[str]:
    return [text.text or "" for text in root.iter("text") if text.get("class") == "shape"]


def points(edge: Element) -> Iterator[tuple[float, float]]:
    """Points of an edge: vertical lines, and cubic curves."""
    x = y = 0.0
    for letter, text in re.findall(r"([MVC])([^MVC]*)", edge.get("d", "")):
        numbers = [float(number) for number in text.split()]
        if letter == "M":
            x, y = numbers
        elif letter == "V":
            yield from ((x, y + (numbers[0] - y) * step / 16) for step in range(17))
            y = numbers[0]
        else:
            for t in (step / 16 for step in range(17)):
                weights = ((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3)
                yield (
                    sum(w * at for w, at in zip(weights, (x, *numbers[0::2]), strict=True)),
                    sum(w * at for w, at in zip(weights, (y, *numbers[1::2]), strict=True)),
                )
            x, y = numbers[-2:]


class Page(HTMLParser):
    """A page as a browser reads it: its tags, ids, links, rows and texts."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name == "href"]

    def handle_data(self, data: str) -> None:
        self.words.append(data)
