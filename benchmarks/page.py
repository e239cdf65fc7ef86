"""Size of the HTML page, and the time to trace the model, to write the page, to open it in a browser, and a module.

    python benchmarks/page.py

Needs torchvision, playwright and Chromium. Without Chromium, only sizes and Python times are printed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import torch
import torchvision
from playwright.sync_api import Browser, sync_playwright
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import hra_fx
from hra_fx.reporting.row import Row
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.html.rendering import render
from hra_fx.view.opening import Options
from hra_fx.view.tree import Leaf

ROUNDS = 7
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def resnet50() -> tuple[Any, Any]:
    # all convolutions, without the classifier
    config = hra_fx.HRAConfig(r=8, target_modules=r".*(conv\d|downsample\.0)")
    return hra_fx.transform(torchvision.models.resnet50(), config), torch.randn(2, 3, 224, 224)


def bert() -> tuple[Any, Any]:
    config = hra_fx.HRAConfig(r=8, target_modules=["query", "key", "value", "dense"])
    return hra_fx.transform(BertModel(BertConfig(vocab_size=64, **SMALL)), config), torch.arange(8)[None]


def llama() -> tuple[Any, Any]:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=16, use_cache=False, **SMALL))
    config = hra_fx.HRAConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    return hra_fx.transform(model, config), torch.arange(8)[None]


def without_repeats(count: int = 10_000) -> tuple[Drawing, None]:
    """An artificial model without repeated modules: 50 blocks of 8 modules with branches."""
    picture: nx.DiGraph[str] = nx.DiGraph()
    picture.graph.update(traced=frozenset({""}), classes={}, details={})
    rows: list[Row] = []
    before = ""
    for index in range(count):
        block, part = index * 50 // count, index * 400 // count % 8
        place = (f"blocks.{block}", f"blocks.{block}.part.{part}")
        path = f"{place[-1]}.layer{index}"
        leaf = Leaf(f"layer{index}", f"Linear {index}→{index}", "module", "call_module", path, place, paths=(path,))
        if index % 3 == 0:
            leaf = Leaf(**{**leaf.__dict__, "kind": "adapted_layer", "marks": (path,), "width": index, "rank": 8})
            angles = tuple(0.4 / (plane + 1) for plane in range(4))
            angle, rotated = 0.1 + index / count, (0.4, 0.2, angles, 1e-7, 0.05, 0.1)
            site = f"Linear {index}->{index}"
            rows.append(Row(path, site, "default", True, index, 8, 8 * index, angle, *rotated))
        picture.add_node(path, leaf=leaf)
        if before:
            picture.add_edge(before, path)
            skipped = list(picture)[index - 7] if index % 5 == 0 and index > 7 else before
            picture.add_edge(skipped, path)
        before = path
    return Drawing("Made", "Made with HRA", f"{count} nodes", picture, tuple(rows)), None


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "resnet50": resnet50,
    "BERT": bert,
    "Llama, 16 layers": llama,
    "10,000 nodes without repeats": without_repeats,
}

OPEN = "[...document.querySelectorAll('#scroller .opens')].at(-1)"
MEASURE = f"""async () => {{
  const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const time = async (act) => {{
    const begin = performance.now();
    act();
    await painted();
    return performance.now() - begin;
  }};
  const one = await time(() => {OPEN}.dispatchEvent(new MouseEvent("click", {{ bubbles: true, detail: 1 }})));
  return [performance.getEntriesByName("drawn")[0].startTime, one];
}}"""


def collected(model: Any, inputs: Any) -> tuple[float, Drawing]:
    """The CPU time in seconds to trace a model and to measure its adapters, and the data for the page."""
    begin = time.process_time()
    drawing = model if isinstance(model, Drawing) else drawing_of(model, inputs)
    return time.process_time() - begin, drawing


def in_browser(browser: Browser, file: Path) -> list[float]:
    """Minimal times in ms: from navigation until the page is drawn, and to open one module."""
    measured = []
    for _ in range(ROUNDS):
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(file.as_uri())
        measured.append(page.evaluate(MEASURE))
        page.close()
    return [min(times) for times in zip(*measured, strict=True)]


def main() -> None:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    torch.set_num_threads(1)  # threads that wait for each other count as CPU time
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=["--no-sandbox"]) if executable else None
        print(f"{browser.version if browser else 'no Chromium: pages are not opened'}; best of {ROUNDS}")
        for name, make in MODELS.items():
            model, inputs = make()
            traced, drawing = collected(model, inputs)
            again, _ = collected(model, inputs)
            taken = []
            for _ in range(ROUNDS):
                begin = time.process_time()
                text = render(drawing, Options())
                taken.append(1e3 * (time.process_time() - begin))
            file = Path(folder, "page.html")
            file.write_text(render(drawing, Options(depth=0)), encoding="utf-8", newline="\n")
            words = f"{name}: {len(drawing.picture):,} nodes, {len(text.encode()) / 1e3:,.0f} kB"
            words += f", traced in {traced:.1f} s of CPU time, again in {again:.2f} s" * (drawing is not model)
            words += f", written in {min(taken):.0f} ms of CPU time"
            if browser:
                words += "; drawn after {:.0f} ms, a module opened in {:.0f} ms".format(*in_browser(browser, file))
            print(words, flush=True)


if __name__ == "__main__":
    main()
