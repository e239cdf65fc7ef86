"""The formats of a report: terminal (layers that repeat are one line), Markdown, JSON and notebook."""

from __future__ import annotations

import json
import math
import re
from html import unescape

import pytest
from reporting.made import HOSTILE, adapted, blocks, report_of, row
from rich.console import Console
from torch import nn

import hra_fx
from hra_fx import report
from hra_fx.reporting.columns import grouped
from hra_fx.reporting.result import Report
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


def test_all_columns_and_numbers_are_in_a_wide_terminal() -> None:
    found = report(adapted())
    (only,) = found.rows
    text = in_terminal(found, 200)
    places = [f"{heading_line(text)} ".index(f" {name} ") for name in WORDS]
    assert places == sorted(places)
    for shown in (f"{math.degrees(only.mean_angle):.1f}°", f"{math.degrees(only.angle):.1f}°", f"{only.rotation:.3f}"):
        assert shown in text
    assert f"{100 * only.share:.1f}%" in text
    assert "1 adapted layer, 12 adapter parameters (48 bytes), adapter default" in text


def test_a_narrow_terminal_keeps_the_layer_and_its_change() -> None:
    found = report_of(*blocks(2, "q_proj", "v_proj"))
    lost: list[str] = []
    for width in range(130, 50, -4):
        text = in_terminal(found, width)
        missing = [name for name in WORDS if f" {name} " not in f" {heading_line(text)} "]
        lost += [name for name in missing if name not in lost]
        assert set(lost) == set(missing), "what is gone does not come back"
        assert all(len(line) <= width for line in text.splitlines())
    assert lost == ["type", "d", "|Q - I|", "share of W", "max angle", "mean angle", "params"]


def test_the_adapter_is_a_column_where_there_are_several() -> None:
    found = report_of(row("a", adapter="first"), row("a", adapter="second"))
    assert " adapter " in heading_line(str(found))
    assert "1 adapted layer, 32 adapter parameters, adapters first, second" in str(found)
    assert " adapter " not in heading_line(str(report_of(row("a"))))


@pytest.mark.parametrize(
    ("angle", "shown"), [(0.0, " 0° "), (1e-6, "0.000057°"), (1e-9, "6e-8°"), (0.01, "0.6°"), (math.nan, "nan°")]
)
def test_small_angles_are_not_rounded_away(angle: float, shown: str) -> None:
    assert shown in str(report_of(row(mean_angle=angle))) + " "


def test_names_are_no_markup() -> None:
    found = report_of(row(HOSTILE), skipped=(SkippedLayer(HOSTILE, "x", HOSTILE),))
    assert in_terminal(found, 400).count(HOSTILE) == str(found).count(HOSTILE) == 3
    page = in_notebook(found)
    assert set(re.findall(r"</?(\w+)", page)) == {"pre", "span"}
    assert "<script>" in "".join(unescape(re.sub(r"<[^>]*>", "", page)).split())
    name = "a\nb <b> [x](y) `c` *d* _e_ f_g"
    text = report_of(row(name), skipped=(SkippedLayer(name, "x", "why"),)).to_markdown()
    assert text.count(r"a b \<b\> \[x\](y) \`c\` \*d\* \_e\_ f_g") == 2


def test_footnotes() -> None:
    found = report_of(row("good"), row("bad", orthogonality=0.02), row("none", orthogonality=math.nan))
    assert "|Q'Q - I| is up to 2e-02, at bad (default)" in str(found)
    assert "not orthogonal" not in str(report_of(row("good")))
    skipped = tuple(SkippedLayer(f"part{index}.fc", "Linear", f"reason {index}") for index in range(9))
    text = str(report_of(row(), skipped=skipped))
    assert text.count("reason ") == 6
    assert "  3 more layers, for 3 other reasons\n" in text
    text = report_of(row(), skipped=(SkippedLayer("head", "Linear", "it is the output layer"),)).to_markdown()
    assert text.endswith("Not adapted: 1 layer\n\n- head: it is the output layer\n")


def cells_of(line: str) -> list[str]:
    """The cells of a line of a GitHub table: cut at bars that no backslash stands before, then without backslashes."""
    cells = re.split(r"(?<!\\)(?:\\\\)*\|", line.strip().strip("|"))
    return [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells]


def test_markdown_is_a_table_of_as_many_cells_in_each_line() -> None:
    lines = report_of(*blocks(2, "q_proj"), row("a|b*c")).to_markdown().splitlines()
    table = [cells_of(line) for line in lines if line.startswith("|")]
    assert [len(cells) for cells in table] == [len(WORDS)] * 5
    assert table[0] == WORDS
    assert [cells[0] for cells in table[1:]] == [
        *(":--", "model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj", "a|b*c"),
    ]


def test_json_is_valid_and_has_null_for_what_is_no_number() -> None:
    found = report_of(
        row(HOSTILE, share=math.nan, angles=(math.nan,), rotation=math.inf), skipped=(SkippedLayer("a", "b", "c"),)
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(found.to_json(), parse_constant=refuse)
    (only,) = content["rows"]
    assert (only["path"], only["share"], only["angles"], only["rotation"]) == (HOSTILE, None, [None], None)
    assert content["skipped"] == [{"path": "a", "layer_type": "b", "reason": "c", "targeted": False}]


def test_json_says_what_the_rows_say() -> None:
    found = report(adapted())
    content = json.loads(found.to_json(indent=2))
    assert content["rows"] == found.to_dicts()
    assert content["rows"][0]["angles"] == list(found.rows[0].angles)
    assert [layer["path"] for layer in content["skipped"]] == ["1"]


def test_a_notebook_shows_the_table_without_colors() -> None:
    page = in_notebook(report_of(*blocks(3, "q_proj")))
    assert "model.layers.*.attn.q_proj x3" in page
    assert not re.search(r"[^-]color:|#[0-9a-f]{6}", page), "it is readable on light and on dark"


def test_an_empty_report_has_every_form() -> None:
    for text in (str(report_of()), report_of().to_markdown(), in_notebook(report_of())):
        assert "0 adapted layers" in text
    lists = ("rows", "skipped", "trained_in_full", "skipped_parameters")
    assert json.loads(report_of().to_json()) == {name: [] for name in lists}


def test_repeated_layers_are_one_line_with_the_ranges_of_their_values() -> None:
    names = ("attention.self.query", "attention.self.value")
    rows = [
        row(f"encoder.layer.{i}.{name}", weight_change=0.05 + 0.01 * i, mean_angle=math.radians(79 + 11 * i))
        for i in range(3)
        for name in names
    ]
    text = in_terminal(report_of(*rows, row("head")), 120).splitlines()
    wanted = "encoder.layer.*.attention.self.query x3 2 48 5.0 to 7.0% 79 to"
    assert any(" ".join(line.split()).startswith(wanted) for line in text)
    assert any(line.split()[:3] == ["head", "2", "16"] for line in text)
    assert sum("attention" in line for line in text) == 2


def test_layers_that_differ_otherwise_stay_apart() -> None:
    same = row("m.0.q")
    for other in (
        {"r": 4},
        {"d": 9},
        {"adapter": "b"},
        {"active": False},
        {"layer_type": "Linear 9->4"},
        {"weight_change": math.nan},
        {"rotation": math.nan},
    ):
        assert len(grouped([same, row("m.1.q", **other)])) == 2
    assert [group.name for group in grouped([same, row("m.1.q"), row("n.1.q")])] == ["m.*.q", "n.1.q"]


def test_80_columns_have_the_layer_its_rank_its_parameters_and_its_change() -> None:
    """With the names and sizes of MiniLM."""
    names = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    fields = {"r": 8, "d": 384, "parameters": 3072, "weight_change": 0.0831, "mean_angle": 0.5}
    rows = [row(f"encoder.encoder.layer.{i}.{name}", **fields) for i in range(6) for name in names]
    text = in_terminal(report_of(*rows), 80).splitlines()
    (head,) = (line for line in text if " layer " in line)
    assert head.split() == ["layer", "(in", "encoder.encoder)", "r", "params", "weight", "change", "mean", "angle"]
    assert max(map(len, text)) <= 80
    assert any("layer.*.attention.output.dense x6   8   18,432" in line for line in text), "the name is not broken"


def test_a_fresh_adapter_is_not_trained_yet() -> None:
    model = hra_fx.transform(nn.Sequential(nn.Linear(6, 8)), hra_fx.HRAConfig(r=2, target_modules=["0"]))
    assert "not trained yet (identity)" in str(hra_fx.report(model))
    assert "not trained yet (identity)" in hra_fx.report(model).to_markdown()
    assert "not trained yet" not in str(hra_fx.report(adapted()))


def test_a_table_that_is_printed_in_a_terminal_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = report_of(*blocks(3, "q_proj", "v_proj"))
    assert max(map(len, str(found).splitlines())) > 100
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, str(found).splitlines())) <= 80
