"""Modules that are opened inside the picture of a random model: boxes and edges around them make room."""

from __future__ import annotations

import random
from collections.abc import Callable

import networkx as nx
import pytest
from playwright.sync_api import Page

from hra_fx.view import opening
from hra_fx.view.drawing import Drawing
from hra_fx.view.html.rendering import render
from hra_fx.view.opening import Options
from hra_fx.view.tree import Leaf

Open = Callable[..., Page]

#: Lists errors in the picture, as the browser lays it out: boxes that overlap or leave their module, edges that do not
#: begin and end at their boxes and ports, that cross boxes, or that leave their module.
WRONG = """() => {
  const found = [];
  const near = (one, other) => Math.abs(one - other) < 1.5;
  const middle = (place) => (place.left + place.right) / 2;
  const frame = (group) => (group.querySelector(":scope > .frame") ?? group.ownerSVGElement).getBoundingClientRect();
  const within = (x, place, by = 0) => x >= place.left + by && x <= place.right - by;
  const below = (y, place, by = 0) => y >= place.top + by && y <= place.bottom - by;
  const portsOf = (group) => [...(group?.querySelectorAll(":scope > rect.entry") ?? [])];
  const placeOf = (element) => element.getBoundingClientRect();
  for (const scope of document.querySelectorAll("#scroller g")) {
    const boxes = [...scope.querySelectorAll(":scope > g")];
    const [outer, places] = [frame(scope), boxes.map(frame)];
    const box = (index) => boxes.find((group) => group.dataset.index === index);
    const wrong = (what) => found.push(`${scope.ariaLabel}: ${what}`);
    places.forEach((one, i) => {
      if (!within(one.left, outer) || !within(one.right, outer) || !below(one.top, outer) || !below(one.bottom, outer))
        wrong(`${boxes[i].ariaLabel} is outside`);
      for (const other of places.slice(i + 1))
        if (one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom)
          wrong(`${boxes[i].ariaLabel} overlaps a box`);
    });
    for (const edge of scope.querySelectorAll(":scope > .edge")) {
      const total = edge.getTotalLength();
      const at = (length) => edge.getPointAtLength(length).matrixTransform(edge.getScreenCTM());
      const ends = edge.dataset.ends.split(" ");
      const target = edge.hasAttribute("marker-end") ? box(ends.pop()) : undefined;
      const source = box(ends[0]);
      const [from, to] = [at(0), at(total)];
      if (source && !(near(from.y, frame(source).bottom) && within(from.x, frame(source)))) wrong("begins elsewhere");
      const own = portsOf(scope).map(placeOf);
      if (!source && own.length && !own.some((port) => near(middle(port), from.x) && near(port.bottom, from.y)))
        wrong("begins beside its port");
      if (target && !(near(to.y, frame(target).top) && within(to.x, frame(target)))) wrong("ends elsewhere");
      if (!target && scope.ariaLabel && !near(to.y, outer.bottom)) wrong("ends above the border");
      const far = (port) => Math.abs(middle(placeOf(port)) - to.x);
      const [port] = portsOf(target).sort((one, other) => far(one) - far(other));
      if (source && port && !source.ariaLabel.includes(port.nextElementSibling.textContent)) wrong("another port");
      for (let length = 0; length <= total; length += 4) {
        const { x, y } = at(length);
        if (!within(x, outer)) wrong("an edge is outside");
        if (places.some((place) => within(x, place, 1.5) && below(y, place, 1.5))) wrong("an edge crosses a box");
      }
    }
  }
  return found;
}"""
TWISTS = "#scroller g:has(> .twist)"


def random_drawing(seed: int) -> Drawing:
    """Operations in modules up to three levels deep, which read recent and earlier values."""
    choose = random.Random(seed)
    picture: nx.DiGraph[str] = nx.DiGraph(traced=frozenset({""}), classes={}, details={})

    def add(place: tuple[str, ...]) -> None:
        for _ in range(choose.randint(2, 5)):
            if len(place) < 3 and choose.random() < 0.5:
                add((*place, ".".join([*place[-1:], f"m{choose.randint(0, 999)}"])))
                continue
            before, name = list(picture), f"{'x' * choose.randint(1, 14)}{len(picture)}"
            detail, shape = "d" * choose.randint(0, 12), choose.choice(["", "2×3"])
            picture.add_node(name, leaf=Leaf(name, detail, "op", "call_function", "f", place, shape=shape))
            near = before[-choose.choice([1, 2, 4, 12]) :]
            picture.add_edges_from(
                (source, name) for source in choose.sample(near, min(len(near), choose.randint(1, 3)))
            )

    while len(picture) < 25:
        add(())
    return Drawing("Random", "Random", "", picture, ())


@pytest.mark.parametrize("seed", range(5))
def test_modules_are_opened_and_closed_in_place(seed: int, open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "BUDGET", 1)  # so that each module is opened by itself
    page, choose = open_page(render(random_drawing(seed), Options(depth=0))), random.Random(seed)
    scroller = page.locator("#scroller > svg")
    page.keyboard.press("ArrowDown")
    before = scroller.evaluate("picture => picture.outerHTML")
    assert page.evaluate(WRONG) == []
    opened = 0
    while closed := page.locator("#scroller .opens").count():
        page.locator("#scroller .opens").nth(choose.randrange(closed)).dispatch_event("click")
        opened += 1
        assert page.evaluate(WRONG) == []
    assert page.locator(TWISTS).count() == opened > 1
    while page.locator(TWISTS + ":not(.opens)").count():
        page.locator(TWISTS + ":not(.opens) > .twist").last.dispatch_event("click")
    page.keyboard.press("Home")
    assert scroller.evaluate("picture => picture.outerHTML") == before
