"""The smallest model of every timm family, from a table.

Columns of timm_table.tsv: model, keyword arguments that make it smaller, image size, another image size (0: none).
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zoo.entry import Call, Entry

#: A gigabyte in float64.
_LARGE = ("vgg11",)
_TABLE = Path(__file__).with_name("timm_table.tsv")


def _entry(line: str) -> Entry:
    name, kwargs, size, other = line.split("\t")
    sides = [side for side in (int(size), int(other)) if side]
    return Entry(
        f"timm/{name}",
        _builder(name, ast.literal_eval(kwargs)),
        _images(sides),
        sizes=len(sides),
        double=name not in _LARGE,
    )


def _builder(name: str, kwargs: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm  # takes seconds, and not every run needs it

        model: nn.Module = timm.create_model(name, **kwargs)
        return model

    return build


def _images(sides: list[int]) -> Callable[[int, int], Call]:
    def call(batch: int, size: int) -> Call:
        return (torch.randn(batch, 3, sides[size], sides[size]),), {}

    return call


ENTRIES = tuple(_entry(line) for line in _TABLE.read_text().splitlines())
