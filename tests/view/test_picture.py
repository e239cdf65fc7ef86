"""The SVG picture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import pytest
import torchvision
from drawn_models import HOSTILE, UNSPEAKABLE, Residual, drawn
from torch import Tensor, nn

import hra_fx
from hra_fx.reporting.heat import heat_of, scale
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.options import Options
from hra_fx.view.page import page, render
from hra_fx.view.panels import Block, Panel
from hra_fx.view.text import width
from hra_fx.view.tree import Leaf, Mark, Scope

SVG = "{http://www.w3.org/2000/svg}"


def small(*names: str) -> nn.Module:
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(4, 4))
    targets = [name for name, _ in model.named_children()]
    return hra_fx.transform(model.eval(), hra_fx.HRAConfig(r=2, target_modules=targets))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    model = torchvision.models.resnet50().eval()
    return hra_fx.transform(model, hra_fx.HRAConfig(r=8, target_modules=r".*(conv\d|downsample\.0)"))


def picture(model: nn.Module, **options: Any) -> str:
    return render(drawing_of(model), Options(**options))


def counted(file: Path) -> int:
    return sum(int(box.get("data-adapted", 0)) for box in ElementTree.parse(file).iter())


def rectangles(root: ElementTree.Element) -> Iterator[tuple[float, float, float, float]]:
    for box in root.iter(f"{SVG}rect"):
        if box.get("width") != "100%":
            x, y, wide, high = (float(box.get(name, "nan")) for name in ("x", "y", "width", "height"))
            yield x, y, x + wide, y + high


def test_the_file_is_a_picture_that_counts_every_site(resnet: nn.Module, tmp_path: Path) -> None:
    file = hra_fx.visualize(resnet, tmp_path / "adapters.svg")
    assert file == tmp_path / "adapters.svg"
    root = ElementTree.parse(file).getroot()
    assert root.tag == f"{SVG}svg"
    assert counted(file) == 53 == len(hra_fx.report(resnet))
    words = "".join(root.itertext())
    assert "53 adapted layers" in words
    assert "layer3.1 … 5" in words
    assert "× 5" in words


def test_text_stays_in_its_box(resnet: nn.Module) -> None:
    root = ElementTree.fromstring(picture(resnet))
    for group in root.iter(f"{SVG}g"):
        if group.get("class") not in ("adapted_layer", "plain", "closed"):
            continue
        frame = group.find(f"{SVG}rect")
        assert frame is not None
        room = float(frame.get("width", "0"))
        for line in group.findall(f"{SVG}text"):
            assert width("".join(line.itertext()), float(line.get("font-size", "0"))) <= room


def test_no_name_breaks_the_file() -> None:
    leaves = tuple(
        Leaf(name, name, "adapted_layer", "call_module", name, (name,), (Mark(name),), 4, 2)
        for name in (*HOSTILE, *UNSPEAKABLE)
    )
    closed = Scope("<b>", '"&<b>', "C<l>a&ss", False, leaves)
    panels = [Panel("", Block(Scope("", "m", "<M>", True, (*leaves, closed)), (*map(Block, leaves), Block(closed))))]
    drawing = Drawing("m", "<title>&", "</svg>", nx.DiGraph(), (), {})
    text = page(panels, drawing, heatmap_of(drawing, None))
    root = ElementTree.fromstring(text.encode("utf-8"))
    words = "".join(root.itertext())
    for name in ('quo"te', "nul\ufffd", "line break", '"&<b>', "C<l>a&ss", "<title>&", "</svg>"):
        assert name in words
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "title", "defs", "marker", "path", "rect", "g", "text", "tspan", "circle")
    }


def test_a_very_long_name_does_not_widen_the_page(tmp_path: Path) -> None:
    name = "m" * 4000
    root = ElementTree.parse(hra_fx.visualize(small(name), tmp_path / "a.svg")).getroot()
    assert float(root.get("width", "inf")) < 1000
    assert name in "".join(root.itertext())


def test_the_picture_loads_nothing(resnet: nn.Module) -> None:
    text = picture(resnet)
    assert "href" not in text
    assert "url(" not in text.replace("url(#arrow)", "")
    assert text.count("http") == 1


def test_a_layer_that_is_not_called_is_drawn_as_such(tmp_path: Path) -> None:
    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.extra = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y + self.extra(x) if self.training else y

    model = hra_fx.transform(Training().eval(), hra_fx.HRAConfig(r=2, target_modules=["fc", "extra"]))
    assert counted(hra_fx.visualize(model, tmp_path / "a.svg")) == 2


@pytest.mark.parametrize("name", ["resnet", "bert", "llama", "attention", "hostile, in Python"])
@pytest.mark.parametrize("options", [{}, {"heat": "angle"}, {"depth": 0}, {"depth": 2, "heat": "share"}], ids=str)
def test_everything_is_on_the_page_and_nothing_on_the_legend(name: str, options: dict[str, Any]) -> None:
    root = ElementTree.fromstring(picture(drawn(name), **options))
    wide, high = float(root.get("width", "0")), float(root.get("height", "0"))
    boxes = list(rectangles(root))
    assert all(x >= 0 and y >= 0 and right <= wide and bottom <= high for x, y, right, bottom in boxes)
    legend = [float(line.get("y", "0")) for line in root.findall(f"{SVG}text")]
    panels = [float(box.get("y", "0")) for box in root.findall(f"{SVG}g/{SVG}rect")]
    assert max(legend) < min(panels)


def test_a_depth_opens_so_many_levels() -> None:
    frames = [
        [box.get("class") for box in ElementTree.fromstring(picture(drawn("resnet"), depth=depth)).iter(f"{SVG}g")]
        for depth in range(3)
    ]
    assert [names.count("traced") for names in frames] == [0, 3, 10]
    assert [names.count("panel") for names in frames] == [1, 1, 1]


def test_heat_has_a_legend_with_numbers_and_a_cell_for_each_site() -> None:
    root = ElementTree.fromstring(picture(drawn("bert"), heat="mean_angle", depth=0))
    words = [line.text for line in root.iter(f"{SVG}text")]
    assert "mean angle:" in words
    ends = scale(heat_of(hra_fx.report(drawn("bert")).rows, "mean_angle").values())
    assert {f"{end:g}°" for end in ends} <= set(words), "the scale fits the values"
    assert len([box for box in root.iter(f"{SVG}rect") if box.get("class") == "heat"]) > 30
    cells = [
        cell.text
        for group in root.iter(f"{SVG}g")
        if group.get("class") == "closed"
        for cell in group.findall(f"{SVG}rect/{SVG}title")
    ]
    rows = {row.path: row for row in hra_fx.report(drawn("bert"))}
    assert sorted(str(cell).partition(" · ")[0] for cell in cells) == sorted(path for path in rows if "layer" in path)


def test_a_skipped_layer_has_a_mark_and_its_reason() -> None:
    root = ElementTree.fromstring(picture(drawn("llama")))
    marked = [group for group in root.iter(f"{SVG}g") if group.find(f"{SVG}circle[@class='skipped']") is not None]
    tips = [str(group.findtext(f"{SVG}title")) for group in marked]
    assert any("lm_head has no adapter: " in tip for tip in tips)
    assert any("layers.2.mlp.down_proj has no adapter: " in tip for tip in tips)
    assert any(str(line.text).startswith("10 layers not targeted") for line in root.iter(f"{SVG}text"))


def test_no_edge_ends_in_a_piece_of_no_length() -> None:
    root = ElementTree.fromstring(picture(drawn("resnet")))
    for edge in root.iter(f"{SVG}path"):
        if edge.get("class") == "edge":
            heights = re.findall(r"(?:V|M\S+ |C\S+ \S+ \S+ \S+ \S+ )([\d.]+)", edge.get("d", ""))
            assert all(a != b for a, b in pairwise(heights)), edge.get("d")


@pytest.mark.parametrize("depth", [None, 0, 3])
def test_a_plain_model_has_boxes_and_panels_but_no_sites(depth: int | None) -> None:
    root = ElementTree.fromstring(picture(torchvision.models.resnet18().eval(), depth=depth))
    words = "".join(root.itertext())
    assert "11,689,512 parameters · no adapters" in words
    assert "not adapted" not in words
    panels = [group for group in root.iter(f"{SVG}g") if group.get("class") == "panel"]
    assert len(panels) == (3 if depth is None else 1)


def test_a_layer_that_should_have_an_adapter_is_marked_in_red() -> None:
    model = hra_fx.transform(nn.Sequential(Residual(), Residual()), hra_fx.HRAConfig(r=2, target_modules=["fc1"]))
    model[1].fc1 = nn.Linear(4, 8)  # it is targeted, and has no adapter
    text = render(drawing_of(model), Options(depth=2))
    assert len(re.findall(r'<circle [^>]*class="refused"', text)) == 1 + 1, "the layer, and the legend"
    assert len(re.findall(r'<circle [^>]*class="skipped"', text)) == 2 + 1
    assert "1 layer targeted, but not adapted" in text and "2 layers not targeted" in text
