"""Boxes apart, text inside boxes, edges around boxes, when everything is open; paper as wide as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
import transformers
from pages import page_of, rotated, trained_net
from playwright.sync_api import Page
from torch import nn

import hra_fx
from hra_fx.view.drawing import Drawing, drawing_of

Open = Callable[..., Page]

#: Pairs of boxes of one scope that overlap, texts that leave their box, boxes that leave their scope.
FAULTS = """() => {
  const rect = (element) => element.getBoundingClientRect();
  const inside = (a, b) =>
    a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
  const faults = [];
  for (const group of document.querySelectorAll("#stage .inside")) {
    const parts = [...group.children].filter((part) => part.matches(".box"));
    const frames = parts.map((part) => rect(part.querySelector(":scope > .frame:not(.under)")));
    frames.forEach((a, i) => {
      frames.slice(0, i).forEach((b, j) => {
        if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) {
          faults.push(`${parts[i].ariaLabel} on ${parts[j].ariaLabel}`);
        }
      });
      const around = group.parentElement.querySelector(":scope > .frame");
      if (around && !inside(a, rect(around))) faults.push(`${parts[i].ariaLabel} leaves its scope`);
    });
  }
  for (const text of document.querySelectorAll("#stage text")) {
    const frame = text.closest(".box").querySelector(":scope > .frame:not(.under)");
    if (!inside(rect(text), rect(frame))) faults.push(`text ${text.textContent} leaves its box`);
  }
  return faults;
}"""

#: How many points of edges lie inside boxes that can not be opened further.
CROSSED = """() => {
  let crossed = 0;
  for (const group of document.querySelectorAll("#stage .inside")) {
    const lines = group.querySelector(":scope > .edges > .edge");
    if (!lines) continue;
    const frames = [...group.children].filter((part) => part.matches(".box"))
      .map((part) => part.querySelector(":scope > .frame:not(.under)").getBoundingClientRect());
    const matrix = lines.getScreenCTM();
    const length = lines.getTotalLength();
    for (let at = 0; at < length; at += 4) {
      const { x, y } = lines.getPointAtLength(at).matrixTransform(matrix);
      if (frames.some((f) => x > f.left + 1.5 && x < f.right - 1.5 && y > f.top + 1.5 && y < f.bottom - 1.5)) crossed++;
    }
  }
  return crossed;
}"""


def resnet() -> nn.Module:
    model = torchvision.models.resnet18()
    return hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=r".*conv\d"))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=30
    )
    model = transformers.LlamaForCausalLM(config)
    return hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))


def one_call() -> Drawing:
    """With layers that were skipped and are drawn as modules, since torch.export records what is in them."""
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    model = hra_fx.transform(
        transformers.GPT2LMHeadModel(config).eval(), hra_fx.HRAConfig(r=2, target_modules=["c_attn", "c_proj"])
    )
    return drawing_of(rotated(model), (torch.arange(6)[None],))


def branches() -> nn.Module:
    model = torchvision.models.googlenet(init_weights=False)
    return hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=r".*branch\d(\.\d)?\.conv"))


SLOW = [pytest.param(make, marks=pytest.mark.slow) for make in (one_call, branches)]


@pytest.mark.parametrize("make", [trained_net, resnet, llama, *SLOW], ids=lambda make: make.__name__)
def test_nothing_overlaps_or_leaves_its_box(open_page: Open, make: Callable[[], nn.Module | Drawing]) -> None:
    made = make()
    page = open_page(page_of(rotated(made) if isinstance(made, nn.Module) else made))
    page.click("#expand")
    assert page.locator("#stage .closed").count() == 0
    assert page.evaluate(FAULTS) == []
    assert page.evaluate(CROSSED) == 0


def test_opening_one_by_one_gives_the_drawing_of_opening_all(open_page: Open) -> None:
    text = page_of(resnet(), depth=0)
    place = "all => all.map(box => [box.id, ...Object.values(box.getBBox()), box.getAttribute('transform')].join())"
    at_once, one_by_one = open_page(text), open_page(text)
    at_once.click("#expand")
    while one_by_one.locator("#stage .closed").count():
        one_by_one.locator("#stage .closed").last.dispatch_event("click", {"detail": 1})
    one_by_one.keyboard.press("Escape")
    one_by_one.locator(".ring").evaluate_all("rings => rings.forEach((ring) => ring.remove())")
    drawn = [page.locator("#stage .box").evaluate_all(place) for page in (at_once, one_by_one)]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) > 60


def test_paper_has_everything_within_its_width_and_no_controls(open_page: Open) -> None:
    page = open_page(page_of(rotated(resnet())), color_scheme="dark")
    page.click("#expand")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 700, "height": 1000})  # A4 between its margins
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    for control in ("#query", "#expand", "#heat", "#stage"):
        assert not page.locator(control).is_visible()
    assert page.locator("#scale").is_visible()
    pieces = page.locator("#paper svg").evaluate_all("all => all.map(part => part.getBoundingClientRect().height)")
    assert all(height <= 941 for height in pieces), "a piece fits a page"
    shown = page.locator("#paper svg").evaluate_all("all => all.map(part => part.viewBox.baseVal.height)")
    assert sum(shown) == pytest.approx(page.evaluate("document.querySelector('.drawing').viewBox.baseVal.height"))
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("#paper svg").count() == 0
    assert page.pdf(format="A4").startswith(b"%PDF")
