"""A small adapted model with repeated blocks for the tests of the page, and helpers to read a page."""

from __future__ import annotations

import re
from typing import Any

import torch
from playwright.sync_api import Locator, Page
from torch import Tensor, nn

import hra_fx
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.html.rendering import render
from hra_fx.view.opening import Options, focused


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), nn.GELU()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Net(nn.Module):
    """`stem` and `head` have no adapters; the blocks are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 4)
        self.blocks = nn.Sequential(*(Block(12) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def rotated(model: nn.Module) -> nn.Module:
    """Rotate as training does, each layer further than the one before."""
    generator = torch.Generator().manual_seed(0)
    vectors = [parameter for name, parameter in model.named_parameters() if ".hra_u." in name]
    with torch.no_grad():
        for index, u in enumerate(vectors, start=1):
            u += torch.randn(u.shape, generator=generator) * u.norm(dim=0) * 0.05 * index / u.shape[0] ** 0.5
    return model


def trained_net(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": ["up", "down"]} | fields
    return rotated(hra_fx.transform(Net(), hra_fx.HRAConfig(**config)))


def page_of(model: Any, *, depth: int | None = None, focus: str | None = None, heat: str | None = None) -> str:
    drawing = model if isinstance(model, Drawing) else drawing_of(model)
    return render(focused(drawing, focus), Options(depth, focus, heat))


def boxes(page: Page) -> Locator:
    return page.locator("#scroller [role=treeitem]")


def box(page: Page, label: str) -> Locator:
    """The box whose name begins so."""
    return page.locator("#scroller").get_by_role("treeitem", name=re.compile(f"^{re.escape(label)}(,|$)"))


def strip(page: Page, label: str) -> str:
    """The text of the adapter of a box."""
    return box(page, label).locator(":scope > .strip + text").text_content() or ""


def unfolded(page: Page) -> list[str]:
    """The names of the modules that were opened."""
    groups = page.locator("#scroller g:has(> .twist):not(.opens)")
    return [label.split(",")[0] for label in groups.evaluate_all("all => all.map(group => group.ariaLabel)")]


def facts(page: Page) -> dict[str, str]:
    """The facts in the panel; for a repeated name, the last one."""
    return {
        row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in page.locator("#panel dl > div").all()
    }


def search(page: Page, text: str) -> list[str]:
    """The names of what a search finds."""
    page.fill("#query", text)
    return page.locator("#hits b").all_inner_texts()
