"""What `visualize` writes, as a picture and as a page: names, links, colors and places of all boxes."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torchvision
from drawn_models import HOSTILE, MAKERS, Residual, draw, drawn
from torch import nn
from view.reading import SINGLE, Page, adapted_paths, boxes, edges, pictures_of, shapes, svg_of

import hra_fx

# ---- names and links ----


@pytest.mark.parametrize("name", MAKERS)
def test_every_adapted_layer_is_drawn_exactly_once(name: str, tmp_path: Path) -> None:
    paths = {row.path for row in hra_fx.report(drawn(name)).rows}
    for options in ({"depth": None}, {"depth": 2}):
        picture = Counter(adapted_paths(svg_of(draw(name, tmp_path / "a.svg", **options))))
        assert {path: picture[path] for path in paths} == dict.fromkeys(paths, 1)


@pytest.mark.parametrize("name", MAKERS)
def test_a_page_has_each_layer_once_and_a_closed_module_leads_to_its_picture_and_back(
    name: str, tmp_path: Path
) -> None:
    file = draw(name, tmp_path / "a.html", depth=0)
    page, figures = Page(file), pictures_of(file)
    paths = [row.path for row in hra_fx.report(drawn(name)).rows]
    opened = [box for root in figures.values() for box in boxes(root) if box.kind in SINGLE and box.kind != "closed"]
    found = Counter(line.rpartition(" · ")[0] for box in opened for line in box.tip())
    assert {path: found[path] for path in paths} == dict.fromkeys(paths, 1)
    assert Counter(page.ids).most_common(1)[0][1] == 1, "no id twice"
    assert {unquote(link[1:]) for link in page.links} <= {*page.ids}, "each link leads to something"
    assert all(link.startswith("#") for link in page.links)
    closed = {
        unquote(box.element.get("href", "")[1:]): address
        for address, root in figures.items()
        for box in boxes(root)
        if box.kind == "closed"
    }
    assert closed.keys() == figures.keys() - {"/"}, "each picture but the first is that of a closed module"
    for address, root in figures.items():
        way = [
            unquote(link.get("href", "")[1:]) for caption in root.findall("figcaption") for link in caption.iter("a")
        ]
        assert way[-1:] == ([closed[address]] if address in closed else []), "the last link leads back"


@pytest.mark.parametrize("name", ["shared", "hostile", "hostile, in Python"])
def test_a_page_needs_nothing_else_and_names_are_only_text(name: str, tmp_path: Path) -> None:
    file = draw(name, tmp_path / "a.html")
    page, text = Page(file), file.read_text(encoding="utf-8")
    assert page.tags.count("body") == 1
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & {*page.tags}
    assert not {"src", "srcset", "onload", "onclick"} & {name for name, _ in page.attributes}
    text = text.replace(' xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://|@import|url\(", text)
    svg = draw(name, tmp_path / "a.svg")
    tags = {"svg", "style", "title", "path", "rect", "g", "text", "tspan", "circle"}
    assert {element.tag for element in svg_of(svg).iter()} <= tags
    if name != "shared":
        assert all(f"{path}: Linear 4→4" in "".join(page.words) for path in HOSTILE)


def test_the_page_has_the_rows_of_the_report_and_the_reason_of_each_layer(tmp_path: Path) -> None:
    model, page = drawn("resnet"), Page(draw("resnet", tmp_path / "a.html"))
    found, words = hra_fx.report(model), {*page.words}
    assert {row.path for row in found.rows} <= words
    assert {f"{100 * row.weight_change:.1f}%" for row in found.rows} <= words
    part = hra_fx.transform(nn.Sequential(Residual(), nn.Linear(4, 4)), hra_fx.HRAConfig(r=2, target_modules=["fc1"]))
    page = Page(hra_fx.visualize(part, tmp_path / "b.html"))
    skipped = hra_fx.report(part).skipped
    assert {layer.path for layer in skipped} == {"0.fc2", "1"}
    for layer in skipped:
        assert f"{layer.path} has no adapter: {layer.reason}" in "\n".join(page.words).split("\n")


# ---- colors ----


@pytest.mark.parametrize("name", ["resnet", "bert", "repeats"])
def test_the_order_of_colors_is_that_of_the_report(name: str, tmp_path: Path) -> None:
    values = {row.path: row.weight_change for row in hra_fx.report(drawn(name)).rows}
    root = svg_of(draw(name, tmp_path / "a.svg", depth=0))
    legend = [part.get("fill", "") for part in root.iter("rect") if part.get("class") == "heat"]
    assert len({*legend}) == len(legend) > 10
    cells = [part for part in root.iter("rect") if part.get("class") == "cell"]
    shown = {part.findtext("title", "").partition(" · ")[0]: legend.index(part.get("fill", "")) for part in cells}
    assert shown.keys() == values.keys()
    steps = [shown[path] for path in sorted(values, key=values.__getitem__)]
    assert steps == sorted(steps) and len({*steps}) > 1
    texts = ["".join(text.itertext()) for text in root.findall("g/text")]
    assert f"{100 * max(values.values()):.1f}%" in texts, "the scale ends at the largest change"


def luminance(fill: str) -> float:
    parts = (part / 255 for part in bytes.fromhex(fill[1:]))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast_in_both_themes(theme: str, tmp_path: Path) -> None:
    config = hra_fx.HRAConfig(r=2, target_modules=["fc1"], modules_to_save=["fc2"])
    partly = hra_fx.transform(nn.Sequential(Residual(), Residual()), config)
    seen = 0
    for model in (drawn("bert"), drawn("hostile, in Python"), partly):
        root = svg_of(hra_fx.visualize(model, tmp_path / "a.svg"))
        dark = dict(re.findall(r'}?\[fill="(#\w+)"\]\{fill:(#\w+)\}', root.findtext("style", "")))
        for box in boxes(root):
            frame = box.element.find("rect[@class='frame']")
            for part in box.element.findall("text/tspan"):
                colors = [frame.get("fill", ""), part.get("fill", "")]  # type: ignore[union-attr]
                one, other = sorted(luminance(dark[color] if theme == "dark" else color) for color in colors)
                assert (other + 0.05) / (one + 0.05) >= 4.5, (box.texts(), colors)
                seen += 1
    assert seen > 30


# ---- places ----


@pytest.mark.parametrize("name", ["resnet", "bert", "pairs", "attention", "shared", "hostile, in Python"])
@pytest.mark.parametrize("depth", [None, 0, 2], ids=str)
def test_boxes_do_not_overlap_and_edges_go_down_around_them(name: str, depth: int | None, tmp_path: Path) -> None:
    root = svg_of(draw(name, tmp_path / "a.svg", depth=depth))
    wide, high = float(root.get("width", "0")), float(root.get("height", "0"))
    found = boxes(root)
    assert all(box.x >= 0 and box.x + box.wide <= wide and box.y >= 0 and box.y + box.high <= high for box in found)
    assert max(float(text.get("y", "0")) for text in root.findall("text")) < min(box.y for box in found)
    single = [box for box in found if box.kind in SINGLE]
    for a, b in combinations(single, 2):
        assert a.x + a.wide <= b.x or b.x + b.wide <= a.x or a.y + a.high <= b.y or b.y + b.high <= a.y
    for path in edges(root):
        assert [y for _, y in path] == sorted(y for _, y in path)
        assert not any(box.inside(x, y) for x, y in path for box in single)


# ---- what is drawn once, and what edges carry ----


def test_repeats_are_one_box_and_the_files_are_small(tmp_path: Path) -> None:
    model = torchvision.models.resnet50().eval()
    model = hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=r".*(conv\d|downsample\.0)"))
    texts = [text for box in boxes(svg_of(hra_fx.visualize(model, tmp_path / "a.svg"))) for text in box.texts()]
    assert "layer3.1 … 5 × 5" in texts
    assert hra_fx.visualize(model, tmp_path / "a.html").stat().st_size < 250_000


def test_a_shape_is_that_of_the_result_that_the_edge_carries(tmp_path: Path) -> None:
    root = svg_of(draw("pairs", tmp_path / "a.svg", depth=0))
    texts = [text for box in boxes(root) for text in box.texts()]
    assert "blocks.0 … 2 × 3" in texts, "the first block reads two modules, and the others both results of one"
    assert sorted(shapes(root)) == ["5×2", "5×2, 5×4", "5×3", "5×3", "5×4", "5×4"]


def test_a_layer_that_should_have_an_adapter_is_marked(tmp_path: Path) -> None:
    model = hra_fx.transform(nn.Sequential(Residual(), Residual()), hra_fx.HRAConfig(r=2, target_modules=["fc1"]))
    model[1].fc1 = nn.Linear(4, 8)  # it is targeted, and has no adapter
    text = hra_fx.visualize(model, tmp_path / "a.svg", depth=2).read_text(encoding="utf-8")
    assert text.count('class="refused"') == 1 + 1, "the layer, and the legend"
    assert text.count('class="skipped"') == 2 + 1
    assert "1 layer targeted, but not adapted" in text and "2 layers not targeted" in text


def test_layers_that_are_trained_in_full_and_unknown_changes_are_explained(tmp_path: Path) -> None:
    config = hra_fx.HRAConfig(r=2, target_modules=["fc1"], modules_to_save=["fc2"], init_weights=False)
    model = hra_fx.transform(nn.Sequential(Residual(), Residual()), config)
    model[1].fc1.to("meta")
    texts = ["".join(line.itertext()) for line in svg_of(hra_fx.visualize(model, tmp_path / "a.svg")).iter("text")]
    assert {"trained in full", "unknown", "r 2 · d 4 · mean unknown"} <= {*texts}
    part = svg_of(hra_fx.visualize(model, tmp_path / "a.svg", focus="0.fc1"))
    assert not {"trained in full", "unknown"} & {"".join(line.itertext()) for line in part.iter("text")}


def test_a_plain_model_is_drawn_without_colors(tmp_path: Path) -> None:
    model = nn.Sequential(Residual(), nn.Linear(4, 4))
    for ending in ("svg", "html"):
        text = hra_fx.visualize(model, tmp_path / f"a.{ending}", depth=0).read_text(encoding="utf-8")
        assert "Linear 4→4" in text and "no adapters" in text and 'class="heat"' not in text


# ---- options, and errors ----


def test_a_focus_draws_one_module(tmp_path: Path) -> None:
    file = draw("resnet", tmp_path / "a.svg", focus="layer2")
    paths = [row.path for row in hra_fx.report(drawn("resnet")).rows]
    found = adapted_paths(svg_of(file))
    assert [path in found for path in paths] == [path.startswith("layer2.") for path in paths]
    assert "layer2 in ResNet with HRA" in file.read_text()


@pytest.mark.parametrize("ending", ["svg", "html"])
def test_the_same_model_gives_the_same_bytes(ending: str, tmp_path: Path) -> None:
    first = draw("shared", tmp_path / f"a.{ending}").read_bytes()
    assert hra_fx.visualize(drawn("shared"), str(tmp_path / f"b.{ending.upper()}")).read_bytes() == first


WRONG = [
    (".svg", {"focus": "zzz"}, r"`focus`: the picture has no module 'zzz'\. See model\.named_modules\(\)"),
    *((ending, {}, r"Use one of \.svg, \.html") for ending in (".jpg", "", ".svg.gz")),
]


@pytest.mark.parametrize(("ending", "options", "message"), WRONG)
def test_wrong_options_leave_the_file_as_it_was(ending: str, options: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{ending}"
    file.write_text("before")
    with pytest.raises(hra_fx.VisualizeError, match=message):
        hra_fx.visualize(drawn("pairs"), file, **options)
    assert file.read_text() == "before" and [*tmp_path.iterdir()] == [file]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hra_fx.visualize(drawn("one layer"), tmp_path / "nowhere" / "a.svg")
    assert not [*tmp_path.iterdir()]
