"""The plots: their content, and that their files are reproducible."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reporting.made import HOSTILE, adapted, blocks, report_of, row

import hra_fx
from hra_fx.errors import VisualizeError
from hra_fx.reporting.colormap import color
from hra_fx.reporting.plots.grid import cell_of, grid_of
from hra_fx.reporting.plots.training import draw_training
from hra_fx.reporting.progress import Progress

SVG = "{http://www.w3.org/2000/svg}"
LONG = "model.vision_tower.vision_model.encoder.layers.23.self_attn.out_proj" * 2


def texts(file: Path) -> list[str]:
    return ["".join(element.itertext()) for element in ET.parse(file).iter(f"{SVG}text")]


def fills(file: Path) -> list[str]:
    found = re.findall(r"fill: (#[0-9a-f]{6})", file.read_text(encoding="utf-8"))
    return [color for color in found if color != "#ffffff"]


def test_the_heatmap_has_a_cell_for_each_layer_in_its_color(tmp_path: Path) -> None:
    rows = blocks(4, "q_proj", "v_proj")
    file = report_of(*rows).plot_heatmap(tmp_path / "heatmap.svg", "mean_angle")
    assert file == tmp_path / "heatmap.svg"
    words = texts(file)
    assert {"q_proj", "v_proj", "0", "1", "2", "3", "model.layers", "Mean angle by layer"} <= set(words)
    angles = [math.degrees(entry.mean_angle) for entry in rows]
    assert words.count(f"{angles[-1]:.0f}") == 1
    ends = (0.0, 30.0)
    assert {"0°", "15°", "30°"} <= set(words)
    wanted = [color(angle, ends) for angle in angles]
    assert [fill for fill in fills(file) if fill in wanted] == wanted


@pytest.mark.parametrize("heat", ["weight_change", "mean_angle", "angle", "rotation", "share"])
def test_each_heat(heat: str, tmp_path: Path) -> None:
    words = texts(report_of(*blocks(2, "q_proj"), row("head")).plot_heatmap(tmp_path / "heatmap.svg", heat))
    units = {"weight_change": "%", "mean_angle": "°", "angle": "°", "rotation": "", "share": "%"}
    ends = {"weight_change": 10, "mean_angle": 30, "angle": 60, "rotation": 0.5, "share": 25}
    assert f"{ends[heat]}{units[heat]}" in words


def test_of_several_adapters_the_largest_is_shown_or_one(tmp_path: Path) -> None:
    rows = [
        row("a.0.q", adapter="x", mean_angle=math.radians(7)),
        row("a.0.q", adapter="y", mean_angle=math.radians(3)),
    ]
    found = report_of(*rows, row("a.1.q", adapter="y", mean_angle=math.nan))
    both = found.plot_heatmap(tmp_path / "a.svg", "mean_angle")
    one = found.plot_heatmap(tmp_path / "b.svg", "mean_angle", adapter="y")
    assert {"7.0", "largest of adapters x, y", "unknown"} <= set(texts(both))
    assert {"3.0", "adapter y"} <= set(texts(one))
    assert "7.0" not in texts(one)


def test_what_has_no_adapter_and_no_number_is_told_apart(tmp_path: Path) -> None:
    rows = [row("m.0.q", mean_angle=math.nan), row("m.1.v", mean_angle=0.1)]
    assert {"no adapter", "unknown"} <= set(texts(report_of(*rows).plot_heatmap(tmp_path / "a.svg", "mean_angle")))
    full = texts(report_of(*blocks(2, "q")).plot_heatmap(tmp_path / "b.svg"))
    assert not {"no adapter", "unknown"} & set(full)


SHAPES: dict[str, Any] = {
    "one layer": lambda: [row("fc")],
    "no index": lambda: [row("first"), row("second")],
    "only indices": lambda: [row("0"), row("3")],
    "100 layers": lambda: blocks(100, "q_proj", "v_proj"),
    "300 blocks": lambda: blocks(300, "q_proj"),
    "all zeros": lambda: [row(f"m.{i}.q", mean_angle=0.0) for i in range(3)],
    "all NaN": lambda: [row(f"m.{i}.q", mean_angle=math.nan) for i in range(3)],
    "long names": lambda: [row(LONG), *blocks(2, LONG, stack=LONG)],
    "many stacks": lambda: [line for part in "abcdefgh" for line in blocks(2, "q", stack=f"{part}locks.of.some.model")],
    "hostile": lambda: [row(HOSTILE), row("$x_1$\n\x00é語🙂"), row(f"m.0.{HOSTILE}")],
    "tiny": lambda: [row(f"m.{i}.q", mean_angle=1e-7 * i) for i in range(4)],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_unusual_models(shape: str, tmp_path: Path) -> None:
    """No warning (warnings are errors here), files that can be read, and a size that can be shown."""
    found = report_of(*SHAPES[shape]())
    with Image.open(found.plot_heatmap(tmp_path / "heatmap.png")) as image:
        assert image.width * image.height < 4e7
        assert len(set(np.asarray(image.convert("L")).ravel().tolist())) > 2
    assert ET.parse(found.plot_heatmap(tmp_path / "heatmap.svg")).getroot().tag == f"{SVG}svg"


def test_numbers_stay_out_of_cells_that_are_too_narrow(tmp_path: Path) -> None:
    words = texts(report_of(*blocks(100, "q_proj")).plot_heatmap(tmp_path / "heatmap.svg"))
    assert sum(bool(re.fullmatch(r"\d*\.?\d+", word)) for word in words) <= 50, "the columns that are marked"


# where layers go


@pytest.mark.parametrize(
    ("path", "cell"),
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers", "3", "self_attn.q_proj")),
        ("layers.0.blocks.1.attn.qkv", ("layers.0.blocks", "1", "attn.qkv")),
        ("layer1.0.downsample.0", ("layer1", "0", "downsample.0")),
        ("features.1.conv.0.0", ("features", "1", "conv.0.0")),
        ("features.0.0", ("features", "0", "0")),
        ("features.3", ("features", "3", "features")),
        ("3", ("", "3", "layer")),
        ("lm_head", ("", "", "lm_head")),
        ("visual.proj", ("", "", "visual.proj")),
    ],
)
def test_the_block_of_a_path(path: str, cell: tuple[str, str, str]) -> None:
    assert cell_of(path) == cell


def test_rows_have_the_shortest_names_that_tell_them_apart() -> None:
    names = ["attention.self.query", "attention.output.dense", "output.dense", "intermediate.dense"]
    grid = grid_of([f"encoder.layer.{index}.{name}" for index in (0, 1) for name in names])
    assert grid.projections == ("query", "attention.output.dense", "output.dense", "intermediate.dense")
    assert len(set(grid.places.values())) == 8


def test_blocks_of_a_stack_are_beside_each_other() -> None:
    paths = ["a.0.q", "b.0.q", "a.1.q", "head", "b.1.q"]
    assert grid_of(paths).blocks == (("a", "0"), ("a", "1"), ("b", "0"), ("b", "1"), ("", ""))


# two adapters


def test_two_adapters_have_a_mark_each_at_each_layer(tmp_path: Path) -> None:
    rows = [*blocks(3, "q_proj", adapter="left"), *blocks(3, "q_proj", adapter="right"), row("head", adapter="left")]
    file = report_of(*rows).plot_comparison(tmp_path / "two.svg", "left", "right")
    words = texts(file)
    assert {"left and right", "left", "right", "mean angle, degrees", "largest angle, degrees"} <= set(words)
    assert words.count("model.layers.1.attn.q_proj") == 1
    marks = [str(element.get("style")) for element in ET.parse(file).iter(f"{SVG}use")]
    assert sum("#0072b2" in mark for mark in marks) == 2 * 4 + 1, "both panels, and the legend"
    assert sum("#d55e00" in mark for mark in marks) == 2 * 3 + 1


def test_two_adapters_of_odd_models(tmp_path: Path) -> None:
    rows = [line for name in ("a", HOSTILE) for line in blocks(20, LONG, adapter=name)]
    rows.append(row("nan", adapter="a", mean_angle=math.nan, angle=math.nan))
    rows += [row("zero", adapter=name, mean_angle=0.0, angle=0.0) for name in ("a", HOSTILE)]
    with Image.open(report_of(*rows).plot_comparison(tmp_path / "two.png", "a", HOSTILE)) as image:
        assert image.width < 3000


# training


def points(*adapters: str, count: int = 5) -> list[Progress]:
    return [Progress(step, name, 0.01 * step, 0.03 * step, 1e-7 * step) for step in range(count) for name in adapters]


def test_the_plot_of_a_training(tmp_path: Path) -> None:
    words = texts(draw_training(points("a", "b"), tmp_path / "training.svg"))
    assert {"a, mean", "a, largest", "b, mean", "b, largest", "step", "degrees"} <= set(words)
    assert {"0", "3.0e-07"} <= set(words)
    assert not any("$" in word for word in words)


@pytest.mark.parametrize(
    "history",
    [
        points("a", count=1),
        points("a", count=500),
        points(*"abcdefgh"),
        [Progress(step, "a", math.nan, math.nan, math.nan) for step in range(3)],
        [Progress(step, HOSTILE, 0.0, 0.0, 0.0) for step in range(3)],
    ],
    ids=["one point", "500 steps", "eight adapters", "NaN", "zeros"],
)
def test_odd_trainings(history: list[Progress], tmp_path: Path) -> None:
    assert draw_training(history, tmp_path / "training.png").stat().st_size > 1000


# files


def all_plots(folder: Path, ending: str) -> list[Path]:
    found = report_of(*blocks(3, "q", adapter="a"), *blocks(3, "q", adapter="b"))
    return [
        found.plot_heatmap(folder / f"heatmap{ending}"),
        found.plot_comparison(folder / f"two{ending}", "a", "b"),
        draw_training(points("a", "b"), folder / f"training{ending}"),
    ]


@pytest.mark.parametrize("ending", [".SVG", ".png", ".pdf"])
def test_the_same_numbers_give_the_same_file(ending: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for first, second in zip(all_plots(tmp_path / "one", ending), all_plots(tmp_path / "two", ending), strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_no_state_of_matplotlib_is_touched(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    all_plots(tmp_path, ".png")
    assert dict(mpl.rcParams) == before


def test_a_report_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises an ImportError
    found = hra_fx.report(adapted())
    assert all((str(found), found.to_json(), found.to_markdown(), found._repr_html_()))
    message = (
        r"^Plots need matplotlib, which is not installed\. Run: pip install 'hra-fx\[plot\]'.*give the same values"
    )
    for draw in (lambda: found.plot_heatmap(tmp_path / "a.svg"), lambda: found.plot_comparison("a.svg", "a", "b")):
        with pytest.raises(VisualizeError, match=message):
            draw()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_matplotlib_is_only_imported_for_plots_and_pyplot_never(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import hra_fx.reporting.report
assert "matplotlib" not in sys.modules
from reporting.test_plots import all_plots
all_plots(Path(sys.argv[1]), ".svg")
assert "matplotlib.pyplot" not in sys.modules
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    folder = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def refusals() -> dict[str, tuple[Any, str]]:
    found = report_of(row("a", adapter="x"), row("a", adapter="y"))
    return {
        "an unknown ending": (
            lambda folder: found.plot_heatmap(folder / "strip.gif"),
            r"path: unsupported file extension '\.gif' in 'strip\.gif'\. Use one of \.svg, \.png, \.pdf\.",
        ),
        "an unknown heat": (
            lambda folder: found.plot_heatmap(folder / "a.svg", "angles"),
            "`heat` must be one of 'weight_change', 'mean_angle', 'angle', 'rotation', 'share', got 'angles'.",
        ),
        "an unknown adapter": (
            lambda folder: found.plot_heatmap(folder / "a.svg", adapter="z"),
            "`adapter` must be one of 'x', 'y', got 'z'.",
        ),
        "an unknown second adapter": (
            lambda folder: found.plot_comparison(folder / "a.svg", "x", "z"),
            "Adapter 'z' is not in the report, which has 'x', 'y'.",
        ),
        "one adapter twice": (
            lambda folder: found.plot_comparison(folder / "a.svg", "x", "x"),
            "The two adapters must be different, got 'x' twice.",
        ),
        "an empty history": (lambda folder: draw_training([], folder / "a.svg"), "`history` is empty"),
        "an empty report": (
            lambda folder: report_of().plot_heatmap(folder / "a.svg"),
            "The report has no rows",
        ),
    }


@pytest.mark.parametrize("kind", refusals())
def test_refusals(kind: str, tmp_path: Path) -> None:
    draw, message = refusals()[kind]
    with pytest.raises(VisualizeError, match=f"^{message}"):
        draw(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
