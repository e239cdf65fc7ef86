"""Which adapted layers a file tells of, read from each format in a way of its own."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import networkx as nx

SVG = "{http://www.w3.org/2000/svg}"
_VALUE = re.compile(r" · (unknown|[\d.]+[°%]?)$")
_DOT_NODE = re.compile(r"^\s*n\d+ \[(.*)\]$")
_DOT_ATTRIBUTE = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def layers_in(file: Path) -> list[str]:
    """Every line that can name an adapted layer, in a file of any format but `.png`."""
    return _READERS[file.suffix](file)


def _svg(file: Path) -> list[str]:
    """Lines of the tips of the boxes that count, without the values of the heat."""
    boxes = [box for box in ElementTree.parse(file).iter() if int(box.get("data-adapted", 0))]
    return [_VALUE.sub("", line) for box in boxes for line in (box.findtext(f"{SVG}title") or "").split("\n")]


def _mermaid(file: Path) -> list[str]:
    comments = re.findall(r"^\s*%% n\d+: (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    paths = [path for comment in comments for path in comment.split(" ")]
    return [re.sub(r"#(\d+);", lambda found: chr(int(found[1])), path) for path in paths]


def _dot(file: Path) -> list[str]:
    lines: list[str] = []
    for row in file.read_text(encoding="utf-8").split("\n"):
        if found := _DOT_NODE.match(row):
            lines += dict(_DOT_ATTRIBUTE.findall(found[1]))["tooltip"].split(r"\n")
    plain = (line.replace(r"\"", '"').replace(r"\\", "\\").replace("&amp;", "&") for line in lines)
    return [_VALUE.sub("", line) for line in plain]


def _graphml(file: Path) -> list[str]:
    return [
        path for _, sites in nx.read_graphml(file).nodes(data="adapted_layers") if sites for path in sites.split("\n")
    ]


_READERS = {".svg": _svg, ".mmd": _mermaid, ".dot": _dot, ".graphml": _graphml}
