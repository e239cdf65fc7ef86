"""The plots: their content, unusual models, and that their files are reproducible."""

from __future__ import annotations

import math
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import pytest
from PIL import Image
from reporting.made import HOSTILE, adapted, blocks, report_of, row

import hra_fx
from hra_fx.errors import VisualizeError
from hra_fx.reporting.heat import color
from hra_fx.reporting.plots import draw_training
from hra_fx.reporting.progress import Progress
from hra_fx.reporting.row import Row

SVG = "{http://www.w3.org/2000/svg}"
LONG = "model.vision_tower.vision_model.encoder.layers.23.self_attn.out_proj" * 2


def texts(file: Path) -> list[str]:
    return ["".join(element.itertext()) for element in ET.parse(file).iter(f"{SVG}text")]


def points(*adapters: str, count: int = 5, scale: float = 0.01) -> list[Progress]:
    return [
        Progress(step, name, scale * step, 3 * scale * step, 1e-5 * scale * step)
        for step in range(count)
        for name in adapters
    ]


def test_the_heatmap_has_a_cell_for_each_layer_in_its_color(tmp_path: Path) -> None:
    rows = blocks(4, "q_proj", "v_proj")
    file = report_of(*rows).plot_heatmap(tmp_path / "heatmap.svg", "mean_angle")
    angles = [math.degrees(entry.mean_angle) for entry in rows]
    words = texts(file)
    assert {"attn.q_proj", "attn.v_proj", "0", "3", "model.layers", "Mean angle by layer", "0°", "30°"} <= set(words)
    assert {f"{angle:.2g}" for angle in angles} <= set(words)
    fills = re.findall(r"fill: (#[0-9a-f]{6})", file.read_text(encoding="utf-8"))
    wanted = [color(angle, (0.0, 30.0)) for angle in angles]
    assert [fill for fill in fills if fill in wanted] == wanted


def test_of_several_adapters_the_largest_is_shown_or_one(tmp_path: Path) -> None:
    rows = [row("a.0.q", adapter=name, mean_angle=math.radians(angle)) for name, angle in (("x", 7), ("y", 3))]
    found = report_of(*rows, row("a.1.q", adapter="y", mean_angle=math.nan))
    both = texts(found.plot_heatmap(tmp_path / "a.svg", "mean_angle"))
    one = texts(found.plot_heatmap(tmp_path / "b.svg", "mean_angle", adapter="y"))
    assert {"7", "largest of adapters x, y", "unknown"} <= set(both)
    assert {"3", "adapter y"} <= set(one) and "7" not in one


def test_two_adapters_have_a_mark_each_at_each_layer(tmp_path: Path) -> None:
    rows = [*blocks(3, "q_proj", adapter="left"), *blocks(3, "q_proj", adapter="right"), row("head", adapter="left")]
    file = report_of(*rows).plot_comparison(tmp_path / "two.svg", "left", "right")
    assert {"left", "right", "mean angle, degrees", "model.layers.1.attn.q_proj", "head"} <= set(texts(file))
    marks = [str(element.get("style")) for element in ET.parse(file).iter(f"{SVG}use")]
    assert sum("#0072b2" in mark for mark in marks) == 2 * 4 + 1, "both panels, and the legend"
    assert sum("#d55e00" in mark for mark in marks) == 2 * 3 + 1


def test_the_plot_of_a_training(tmp_path: Path) -> None:
    words = texts(draw_training(points("a", "b"), tmp_path / "training.svg"))
    assert {"a, mean", "a, largest", "b, mean", "b, largest", "step", "rotation angles, degrees"} <= set(words)
    assert not any("$" in word for word in words)


ROWS: dict[str, Callable[[], list[Row]]] = {
    "no index": lambda: [row("first"), row("second")],
    "only indices": lambda: [row("0"), row("3")],
    "300 blocks": lambda: blocks(300, "q_proj"),
    "all zeros": lambda: [row(f"m.{i}.q", mean_angle=0.0, weight_change=0.0) for i in range(3)],
    "all NaN": lambda: [row(f"m.{i}.q", mean_angle=math.nan, angle=math.nan, weight_change=math.nan) for i in range(3)],
    "long names": lambda: [row(LONG), *blocks(2, LONG, stack=LONG)],
    "hostile": lambda: [row(HOSTILE), row("$x_1$\n\x00é語🙂"), row(f"m.0.{HOSTILE}")],
}


@pytest.mark.parametrize("name", ROWS)
def test_unusual_models(name: str, tmp_path: Path) -> None:
    """No warning (warnings are errors here), and a size that can be shown."""
    rows = ROWS[name]()
    found = report_of(*rows, *(row(entry.path, adapter=HOSTILE) for entry in rows))
    for file in (
        found.plot_heatmap(tmp_path / "heatmap.png"),
        found.plot_comparison(tmp_path / "two.png", "default", HOSTILE),
        draw_training(points(HOSTILE, count=len(rows), scale=rows[0].mean_angle), tmp_path / "training.png"),
    ):
        with Image.open(file) as image:
            assert image.width * image.height < 4e7


@pytest.mark.parametrize("ending", [".SVG", ".png", ".pdf"])
def test_the_same_numbers_give_the_same_file_and_no_state_of_matplotlib_is_changed(ending: str, tmp_path: Path) -> None:
    found, before = report_of(*blocks(3, "q", adapter="a"), *blocks(3, "q", adapter="b")), dict(mpl.rcParams)

    def plots(folder: Path) -> list[bytes]:
        folder.mkdir()
        files = (
            found.plot_heatmap(folder / f"heatmap{ending}"),
            found.plot_comparison(folder / f"two{ending}", "a", "b"),
            draw_training(points("a", "b"), folder / f"training{ending}"),
        )
        return [file.read_bytes() for file in files]

    assert plots(tmp_path / "one") == plots(tmp_path / "two")
    assert dict(mpl.rcParams) == before


def test_a_report_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises an ImportError
    found = hra_fx.report(adapted())
    assert "1 adapted layer" in str(found)
    with pytest.raises(VisualizeError, match=r"Plots need matplotlib.*pip install 'hra-fx\[plot\]'"):
        found.plot_heatmap(tmp_path / "a.svg")


FOUND = report_of(row("a", adapter="x"), row("a", adapter="y"))
REFUSED: dict[str, Callable[[Path], Path]] = {
    r"path: unsupported file extension '\.gif' in 'a\.gif'\. Use one of \.svg, \.png, \.pdf\.": (
        lambda folder: FOUND.plot_heatmap(folder / "a.gif")
    ),
    "`heat` must be one of 'weight_change', .*, got 'angles'": (
        lambda folder: FOUND.plot_heatmap(folder / "a.svg", "angles")
    ),
    "`adapter` must be one of 'x', 'y', got 'z'": lambda folder: FOUND.plot_heatmap(folder / "a.svg", adapter="z"),
    "Adapter 'z' is not in the report, which has 'x', 'y'": (
        lambda folder: FOUND.plot_comparison(folder / "a.svg", "x", "z")
    ),
    "The two adapters must be different": lambda folder: FOUND.plot_comparison(folder / "a.svg", "x", "x"),
    "`history` is empty": lambda folder: draw_training([], folder / "a.svg"),
    "The report has no rows": lambda folder: report_of().plot_heatmap(folder / "a.svg"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str, tmp_path: Path) -> None:
    with pytest.raises(VisualizeError, match=f"^{message}"):
        REFUSED[message](tmp_path)
    assert list(tmp_path.iterdir()) == []
