"""`visualize`: the file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torchvision
from torch import Tensor, nn

import hra_fx
from hra_fx.view import svg
from hra_fx.view.page import Heading, page
from hra_fx.view.panels import Block, Panel
from hra_fx.view.picture import draw
from hra_fx.view.text import clean, shorten, width
from hra_fx.view.tree import Leaf, Mark, Scope

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = ["<script>", "a&b", "apo'strophe", "]]>", "-->", "bell\x07", "日本"]
#: Names that a module can have, but that no generated code can hold.
UNSPEAKABLE = ['quo"te', "nul\x00", "line\nbreak", "\ud800", *HOSTILE]


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


def counted(file: Path) -> int:
    return sum(int(box.get("data-sites", 0)) for box in ElementTree.parse(file).iter())


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


def test_all_boxes_are_on_the_page(resnet: nn.Module) -> None:
    root = ElementTree.fromstring(draw(resnet, hra_fx.graphs(resnet)))
    wide, high = float(root.get("width", "0")), float(root.get("height", "0"))
    boxes = list(rectangles(root))
    assert len(boxes) > 30
    assert all(x >= 0 and y >= 0 and right <= wide and bottom <= high for x, y, right, bottom in boxes)
    assert wide <= 1700


def test_text_stays_in_its_box(resnet: nn.Module) -> None:
    root = ElementTree.fromstring(draw(resnet, hra_fx.graphs(resnet)))
    for group in root.iter(f"{SVG}g"):
        if group.get("class") not in ("site", "plain", "closed"):
            continue
        frame = group.find(f"{SVG}rect")
        assert frame is not None
        room = float(frame.get("width", "0"))
        for line in group.findall(f"{SVG}text"):
            assert width("".join(line.itertext()), float(line.get("font-size", "0"))) <= room


def test_the_same_model_gives_the_same_bytes(resnet: nn.Module, tmp_path: Path) -> None:
    first = hra_fx.visualize(resnet, tmp_path / "a.svg").read_bytes()
    assert hra_fx.visualize(resnet, str(tmp_path / "b.SVG")).read_bytes() == first


def test_a_resnet50_takes_less_than_a_second(resnet: nn.Module, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is measured is this package, not how busy the other cores are
    try:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            hra_fx.visualize(resnet, tmp_path / "a.svg")
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) < 1


def test_hostile_module_names_are_text(tmp_path: Path) -> None:
    file = hra_fx.visualize(small(*HOSTILE), tmp_path / "a.svg")
    root = ElementTree.parse(file).getroot()
    words = "".join(root.itertext())
    assert counted(file) == len(HOSTILE)
    for name in ("<script>", "a&b", "apo'strophe", "]]>", "-->", "bell\ufffd", "日本"):
        assert name in words
    assert not list(root.iter(f"{SVG}script"))


def test_no_name_breaks_the_file() -> None:
    leaves = tuple(Leaf(name, name, "site", "call_module", name, (name,), (Mark(name),), 4, 2) for name in UNSPEAKABLE)
    closed = Scope("<b>", '"&<b>', "C<l>a&ss", False, leaves)
    panels = [Panel("", Block(Scope("", "m", "<M>", True, (*leaves, closed)), (*map(Block, leaves), Block(closed))))]
    text = page(panels, Heading("<title>&", "</svg>"))
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
    text = draw(resnet, hra_fx.graphs(resnet))
    assert "href" not in text
    assert "url(" not in text.replace("url(#arrow)", "")
    assert text.count("http") == 1


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    model = small("a", "b")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 4)
    y = model(x)
    hra_fx.visualize(model, tmp_path / "a.svg")
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), y)


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


@pytest.mark.parametrize("name", ["a.png", "a.html", "a", "a.svg.gz", ".svg"])
def test_other_endings_are_refused_with_those_that_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(hra_fx.VisualizeError, match=r"formats that can be written are \.svg"):
        hra_fx.visualize(small("a"), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(hra_fx.VisualizeError, match=r"nowhere.*does not exist"):
        hra_fx.visualize(small("a"), tmp_path / "nowhere" / "a.svg")


def test_a_model_without_adapters_is_told_what_to_call(tmp_path: Path) -> None:
    with pytest.raises(hra_fx.VisualizeError, match=r"hra_fx\.transform"):
        hra_fx.visualize(nn.Linear(2, 2), tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_all_text_is_easy_to_read() -> None:
    pairs = [(ink, fill) for fill, _, ink in svg.LOOKS.values()]
    pairs += [
        (ink, fill)
        for ink in (svg.INK, svg.FAINT)
        for fill in (svg.CARD, svg.PAPER, *(f[0] for f in svg.FRAMES.values()))
    ]
    pairs += [(svg.VIOLET, svg.VIOLET_PALE), ("#ffffff", svg.BLUE)]
    assert min(contrast(ink, fill) for ink, fill in pairs) >= 6


def test_text_helpers() -> None:
    assert clean("a\x00b\tc\ud800") == "a\ufffdb c\ufffd"
    assert shorten("abcdefgh", 5) == "ab…gh"
    assert shorten("abc", 3) == "abc"
    assert width("", 10) == 0
