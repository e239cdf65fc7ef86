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

SINGLE = ("adapted_layer", "plain", "trained", "closed", "port")
_VALUE = re.compile(r" · (unknown|[\d.]+%)$")


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
        """Its lines of text, without those of boxes in it."""
        return [" ".join(line.itertext()) for line in self.element.findall("text")]

    def tip(self) -> list[str]:
        return (self.element.findtext("title") or "").split("\n")

    def inside(self, x: float, y: float) -> bool:
        return self.x + 0.2 < x < self.x + self.wide - 0.2 and self.y + 0.2 < y < self.y + self.high - 0.2


def svg_of(file: Path) -> Element:
    """The picture in a file, with tags without a namespace."""
    return ElementTree.fromstring(file.read_text(encoding="utf-8").replace(' xmlns="http://www.w3.org/2000/svg"', ""))


def pictures_of(file: Path) -> dict[str, Element]:
    """The pictures of a page by address."""
    text = file.read_text(encoding="utf-8").replace(' xmlns="http://www.w3.org/2000/svg"', "")
    figures = re.findall(r"<figure .*?</figure>", text, re.DOTALL)
    found = [ElementTree.fromstring(figure) for figure in figures]
    return {figure.get("id", ""): figure for figure in found}


def placed(root: Element, x: float = 0.0, y: float = 0.0) -> Iterator[tuple[Element, float, float]]:
    """All elements in an element, each with the place of its origin in the picture."""
    for element in root:
        at = re.fullmatch(r"translate\((\S+) (\S+)\)", element.get("transform", ""))
        left, top = (x + float(at[1]), y + float(at[2])) if at else (x, y)
        yield element, left, top
        yield from placed(element, left, top)


def boxes(root: Element) -> list[Box]:
    found = []
    for element, x, y in placed(root):
        if (frame := element.find("rect[@class='frame']")) is not None:
            size = float(frame.get("width", "nan")), float(frame.get("height", "nan"))
            found.append(Box(element, element.get("class", ""), x, y, *size))
    return found


def adapted_paths(root: Element) -> list[str]:
    """The adapted layers in the tooltips of boxes that are not opened, without their values."""
    shown = [box for box in boxes(root) if box.kind in SINGLE]
    return [_VALUE.sub("", line) for box in shown for line in box.tip()]


def shapes(root: Element) -> list[str]:
    return ["".join(line.itertext()) for line in root.iter("text") if line.get("class") == "shape"]


def edges(root: Element) -> Iterator[list[tuple[float, float]]]:
    """Points of each edge, which consists of vertical lines and cubic curves."""
    for element, left, top in placed(root):
        if element.get("class") == "edge":
            yield [(left + x, top + y) for x, y in _points(element.get("d", ""))]


def _points(path: str) -> Iterator[tuple[float, float]]:
    x = y = 0.0
    for letter, text in re.findall(r"([MVC])([^MVC]*)", path):
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
    """A page as a browser reads it: its tags, ids, links and texts."""

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
