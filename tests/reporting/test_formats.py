"""The formats of a report: terminal, JSON, notebook, and the heatmap."""

from __future__ import annotations

import json
import math
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html import unescape
from pathlib import Path

import matplotlib as mpl
import pytest
from PIL import Image
from reporting.made import HOSTILE, adapted, blocks, report_of, row
from rich.console import Console

import hra_fx
from hra_fx.errors import VisualizeError
from hra_fx.reporting.heat import color
from hra_fx.reporting.report import Report
from hra_fx.reporting.row import Row
from hra_fx.reporting.skipped_layers import SkippedLayer

WORDS = ["layer", "type", "d", "r", "params", "weight change", "mean angle", "max angle", "|Q - I|", "share of W"]


def in_terminal(found: Report, width: int) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(found)
    return capture.get()


def in_notebook(found: Report) -> str:
    return str(found._repr_mimebundle_([], [])["text/html"])


def heading_line(text: str) -> str:
    return next(line for line in text.splitlines() if " layer " in f"{line} ")


def test_a_narrow_terminal_drops_columns_and_keeps_the_layer_and_its_change() -> None:
    found = hra_fx.report(adapted())
    (only,) = found.rows
    text = in_terminal(found, 200)
    places = [f"{heading_line(text)} ".index(f" {name} ") for name in WORDS]
    assert places == sorted(places)
    for shown in (f"{math.degrees(only.mean_angle):.1f}°", f"{only.rotation:.3f}", f"{100 * only.share:.1f}%"):
        assert shown in text
    assert "1 adapted layer, 12 adapter parameters (48 bytes), adapter default\n" in text
    found, lost = report_of(*blocks(2, "q_proj", "v_proj")), list[str]()
    for width in range(130, 50, -4):
        text = in_terminal(found, width)
        missing = [name for name in WORDS if f" {name} " not in f" {heading_line(text)} "]
        lost += [name for name in missing if name not in lost]
        assert set(lost) == set(missing), "a dropped column does not come back"
        assert all(len(line) <= width for line in text.splitlines())
    assert "layer (in model)" in heading_line(text) and "layers.*.attn.q_proj x2 " in text, "names are not broken"
    assert lost == ["type", "d", "|Q - I|", "share of W", "max angle", "mean angle", "params"]


def test_several_adapters_have_a_column() -> None:
    found = report_of(row("a", adapter="first"), row("a", adapter="second"))
    assert " adapter " in heading_line(str(found))
    assert "1 adapted layer, 32 adapter parameters, adapters first, second" in str(found)
    assert " adapter " not in heading_line(str(report_of(row("a"))))


@pytest.mark.parametrize(
    ("angle", "shown"), [(0.0, " 0° "), (1e-6, "0.000057°"), (1e-9, "6e-8°"), (0.01, "0.6°"), (math.nan, "unknown")]
)
def test_small_angles_are_not_rounded_away(angle: float, shown: str) -> None:
    assert shown in str(report_of(row(mean_angle=angle))) + " "


def test_names_are_not_interpreted_as_markup() -> None:
    found = report_of(row(HOSTILE), skipped=(SkippedLayer(HOSTILE, "x", HOSTILE),))
    assert in_terminal(found, 400).count(HOSTILE) == str(found).count(HOSTILE) == 3
    page = in_notebook(found)
    assert not re.search(r"[^-]color:|#[0-9a-f]{6}", page), "readable on light and dark backgrounds"
    assert set(re.findall(r"</?(\w+)", page)) == {"pre", "span"}
    assert "<script>" in "".join(unescape(re.sub(r"<[^>]*>", "", page)).split())


def test_footnotes() -> None:
    found = report_of(row("good"), row("bad", orthogonality=0.02), row("none", orthogonality=math.nan))
    assert "|Q'Q - I| is up to 2e-02, at bad (default)" in str(found)
    assert "not orthogonal" not in str(report_of(row("good")))
    skipped = tuple(SkippedLayer(f"part{index}.fc", "Linear", f"reason {index}") for index in range(9))
    text = str(report_of(row(), skipped=skipped))
    assert text.count("reason ") == 6
    assert "  3 more layers, for 3 other reasons\n" in text


def test_json_is_valid_and_has_null_for_numbers_that_are_not_finite() -> None:
    found = report_of(
        row(HOSTILE, share=math.nan, angles=(math.nan,), rotation=math.inf), skipped=(SkippedLayer("a", "b", "c"),)
    )
    content = json.loads(found.to_json(), parse_constant=pytest.fail)
    (only,) = content["rows"]
    assert (only["path"], only["share"], only["angles"], only["rotation"]) == (HOSTILE, None, [None], None)
    assert content["skipped"] == [{"path": "a", "layer_type": "b", "reason": "c", "targeted": False}]
    finite = report_of(*blocks(2, "q_proj"))
    assert json.loads(finite.to_json(indent=2))["rows"] == finite.to_dicts()


def test_an_empty_report_has_every_form() -> None:
    for text in (str(report_of()), in_notebook(report_of())):
        assert "0 adapted layers" in text
    lists = ("rows", "skipped", "trained_in_full", "skipped_parameters")
    assert json.loads(report_of().to_json()) == {name: [] for name in lists}


def test_repeated_layers_are_one_line_with_the_ranges_of_their_values() -> None:
    names = ("attention.self.query", "attention.self.value")
    rows = [
        row(f"encoder.layer.{i}.{name}", weight_change=0.115 + 0.001 * i, mean_angle=math.radians(79 + 11 * i))
        for i in range(3)
        for name in names
    ]
    text = in_terminal(report_of(*rows, row("head")), 120).splitlines()
    wanted = "encoder.layer.*.attention.self.query x3 2 48 11.5 to 11.7% 79 to"
    assert any(" ".join(line.split()).startswith(wanted) for line in text)
    assert any(line.split()[:3] == ["head", "2", "16"] for line in text)
    assert sum("attention" in line for line in text) == 2


@pytest.mark.parametrize(
    "other",
    [
        *({"r": 4}, {"d": 9}, {"adapter": "b"}, {"active": False}, {"layer_type": "Linear 9->4"}),
        *({"weight_change": math.nan}, {"rotation": math.nan}, {"path": "n.1.q"}),
    ],
    ids=str,
)
def test_layers_that_differ_in_anything_else_are_separate_lines(other: dict[str, object]) -> None:
    same = row("m.0.q")
    assert "m.*.q x2" in str(report_of(same, row("m.1.q")))
    assert " x2" not in str(report_of(same, row(**{"path": "m.1.q", **other})))  # type: ignore[arg-type]


def test_the_heading_says_if_adapters_are_not_trained() -> None:
    assert "not trained yet (identity)" in str(report_of(row(angles=())))
    assert "not trained yet" not in str(report_of(row()))


def test_a_table_that_is_printed_in_a_terminal_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = report_of(*blocks(3, "q_proj", "v_proj"))
    assert max(map(len, str(found).splitlines())) > 100
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, str(found).splitlines())) <= 80


# ---- the heatmap ----

SVG = "{http://www.w3.org/2000/svg}"
LONG = "model.vision_tower.vision_model.encoder.layers.23.self_attn.out_proj" * 2


def texts(file: Path) -> list[str]:
    return ["".join(element.itertext()) for element in ET.parse(file).iter(f"{SVG}text")]


def test_the_heatmap_has_a_colored_cell_for_each_layer(tmp_path: Path) -> None:
    rows = blocks(4, "q_proj", "v_proj")
    file = report_of(*rows).plot_heatmap(tmp_path / "heatmap.svg", "mean_angle")
    angles = [math.degrees(entry.mean_angle) for entry in rows]
    names = {f"model.layers.*.attn.{name}" for name in ("q_proj", "v_proj")}
    assert {*names, "0", "3", "Mean angle by layer", "0°", "30°", *(f"{angle:.2g}" for angle in angles)} <= set(
        texts(file)
    )
    fills = re.findall(r"fill: (#[0-9a-f]{6})", file.read_text(encoding="utf-8"))
    wanted = [color(angle, (0.0, 30.0)) for angle in angles]
    assert [fill for fill in fills if fill in wanted] == wanted


def test_the_heatmap_shows_the_largest_of_several_adapters_or_one(tmp_path: Path) -> None:
    rows = [row("a.0.q", adapter=name, mean_angle=math.radians(angle)) for name, angle in (("x", 7), ("y", 3))]
    found = report_of(*rows, row("a.1.q", adapter="y", mean_angle=math.nan))
    both = texts(found.plot_heatmap(tmp_path / "a.svg", "mean_angle"))
    one = texts(found.plot_heatmap(tmp_path / "b.svg", "mean_angle", adapter="y"))
    assert {"7", "largest of adapters x, y", "unknown"} <= set(both)
    assert {"3", "adapter y"} <= set(one) and "7" not in one


ROWS: dict[str, Callable[[], list[Row]]] = {
    "only indices": lambda: [row("0"), row("3")],
    "120 blocks": lambda: blocks(120, "q_proj"),
    "all zeros": lambda: [row(f"m.{i}.q", mean_angle=0.0, weight_change=0.0) for i in range(3)],
    "all NaN": lambda: [row(f"m.{i}.q", mean_angle=math.nan, angle=math.nan, weight_change=math.nan) for i in range(3)],
    "long and hostile": lambda: [row(LONG), *blocks(2, LONG, stack=LONG), row(HOSTILE), row("$x_1$\n\x00é語🙂")],
}


@pytest.mark.parametrize("name", ROWS)
def test_heatmaps_of_unusual_models_have_a_limited_size_and_are_reproducible(name: str, tmp_path: Path) -> None:
    """They do not change matplotlib's state."""
    rows, before = ROWS[name](), dict(mpl.rcParams)
    found = report_of(*rows, *(row(entry.path, adapter=HOSTILE) for entry in rows))
    for ending in (".png", ".SVG", ".pdf") if name == "only indices" else (".png",):
        made = [found.plot_heatmap(tmp_path / f"heatmap{turn}{ending}") for turn in range(2)]
        assert made[0].read_bytes() == made[1].read_bytes()
        if ending == ".png":
            with Image.open(made[0]) as image:
                assert image.width * image.height < 4e7
    assert dict(mpl.rcParams) == before


def test_a_report_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises an ImportError
    found = hra_fx.report(adapted())
    assert "1 adapted layer" in str(found)
    with pytest.raises(VisualizeError, match=r"Plots need matplotlib.*pip install matplotlib\."):
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
    "The report has no rows": lambda folder: report_of().plot_heatmap(folder / "a.svg"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str, tmp_path: Path) -> None:
    with pytest.raises(VisualizeError, match=f"^{message}"):
        REFUSED[message](tmp_path)
    assert list(tmp_path.iterdir()) == []
