"""Every format: each adapted layer exactly once, nothing written if an error is raised, reproducible bytes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from drawn_models import MAKERS, Residual, drawing, drawn
from torch import nn

import hra_fx
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.opening import Options
from hra_fx.view.picture import rendered

SVG = "{http://www.w3.org/2000/svg}"
_VALUE = re.compile(r" · (unknown|[\d.]+[°%]?)$")


def _svg(file: Path) -> list[str]:
    """The lines of the tooltips of boxes with adapted layers, without the values of the heatmap."""
    boxes = [box for box in ElementTree.parse(file).iter() if int(box.get("data-adapted", 0))]
    return [_VALUE.sub("", line) for box in boxes for line in (box.findtext(f"{SVG}title") or "").split("\n")]


def _html(file: Path) -> list[str]:
    """The layers of all boxes in all pictures of a page."""
    text = file.read_text(encoding="utf-8")
    data = text.partition('<script id="data" type="application/json">')[2].partition("</script>")[0]
    items = json.loads(data)["items"]
    drawn = map(int, re.findall(r'<g [^>]*data-index="(\d+)"', text))
    return [path for index in drawn for path in items[index].get("marks", ())]


READERS = {".svg": _svg, ".html": _html}


def written(found: Drawing, folder: Path, **options: Any) -> Iterable[tuple[str, Counter[str]]]:
    """For each readable format, how often it names each adapted layer."""
    for ending in READERS:
        file = folder / f"a{ending}"
        file.write_bytes(rendered(file, found, Options(**options)))
        yield ending, Counter(READERS[ending](file))


@pytest.mark.parametrize("options", [{}, {"depth": 1, "heat": "mean_angle"}], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_every_adapted_layer_is_in_every_format_exactly_once(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    paths = {row.path for row in drawing(name).rows}
    for ending, found in written(drawing(name), tmp_path, **options):
        assert {path: found[path] for path in paths} == dict.fromkeys(paths, 1), ending


def test_a_focus_has_the_layers_of_its_module(tmp_path: Path) -> None:
    paths = [row.path for row in drawing("resnet").rows]
    for ending, found in written(drawing("resnet"), tmp_path, focus="layer2"):
        assert [found[path] for path in paths] == [path.startswith("layer2.") for path in paths], ending


def test_a_plain_model_is_drawn_too(tmp_path: Path) -> None:
    for ending, _ in written(drawing_of(nn.Sequential(Residual(), nn.Linear(4, 4))), tmp_path, depth=0):
        text = (tmp_path / f"a{ending}").read_text(encoding="utf-8")
        assert "Linear 4→4" in text.replace("\\u2192", "→"), ending
        assert ending == ".html" or "adapter" not in text.replace("no adapters", ""), ending


@pytest.mark.parametrize("ending", ["svg", "html"])
def test_the_same_model_gives_the_same_bytes(ending: str, tmp_path: Path) -> None:
    first = hra_fx.visualize(drawn("shared"), tmp_path / f"a.{ending}", heat="angle").read_bytes()
    again = hra_fx.visualize(drawn("shared"), str(tmp_path / f"b.{ending.upper()}"), heat="angle").read_bytes()
    assert first == again


def test_errors_leave_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    long = tmp_path / ("m" * 245 + ".svg")  # the name of the temporary file is too long
    for file in (tmp_path / "a.svg", long):
        file.write_text("before")
    for path, options, message in (
        *((tmp_path / name, {}, r"Use one of \.svg .*\.html") for name in ("a.jpg", "a", "a.svg.gz", ".svg")),
        (tmp_path / "nowhere" / "a.svg", {}, r"^path: the folder '.*nowhere' does not exist"),
        (tmp_path / "folder.svg", {}, r"^path: '.*folder\.svg' is a folder"),
        (tmp_path / "a.svg", {"focus": "nowhere"}, "no module 'nowhere'"),
        (long, {}, r"^path: cannot write "),
    ):
        with pytest.raises(hra_fx.VisualizeError, match=message):
            hra_fx.visualize(drawn("one layer"), path, **options)  # type: ignore[arg-type]
    assert {file.name for file in tmp_path.iterdir()} == {"folder.svg", "a.svg", long.name}
    assert (tmp_path / "a.svg").read_text() == long.read_text() == "before"
