"""The formats of a report: terminal, Markdown, JSON and notebook, with names that contain markup."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import pytest
from reporting.made import HOSTILE, adapted, blocks, report_of, row
from rich.console import Console

from hra_fx import report
from hra_fx.reporting.result import Report
from hra_fx.reporting.skipped_layers import SkippedLayer

WORDS = ["layer", "type", "d", "r", "params", "weight change", "mean angle", "max angle", "|Q - I|", "share of W"]


def in_terminal(found: Report, width: int) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(found)
    return capture.get()


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
    assert "1 adapted layer, 12 adapter parameters (48 B), adapter default" in text


def test_a_narrow_terminal_keeps_the_layer_and_its_change() -> None:
    found = report_of(*blocks(2, "q_proj", "v_proj"))
    lost: list[str] = []
    for width in range(130, 50, -1):
        text = in_terminal(found, width)
        line = heading_line(text)
        missing = [name for name in WORDS if f" {name} " not in f" {line} "]
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


def test_names_are_no_markup_in_a_terminal() -> None:
    text = in_terminal(report_of(row(HOSTILE), skipped=(SkippedLayer(HOSTILE, "x", HOSTILE),)), 400)
    assert text.count(HOSTILE) == 3
    assert str(report_of(row(HOSTILE), skipped=(SkippedLayer(HOSTILE, "x", HOSTILE),))).count(HOSTILE) == 3


def test_a_q_that_is_not_orthogonal_is_remarked() -> None:
    found = report_of(row("good"), row("bad", orthogonality=0.02), row("none", orthogonality=math.nan))
    assert "|Q'Q - I| is up to 2e-02, at bad (default)" in str(found)
    assert "not orthogonal" not in str(report_of(row("good")))


def test_many_reasons_are_cut_with_their_number() -> None:
    skipped = tuple(SkippedLayer(f"part{index}.fc", "Linear", f"reason {index}") for index in range(9))
    text = str(report_of(row(), skipped=skipped))
    assert text.count("reason ") == 6
    assert "  3 more layers, for 3 other reasons\n" in text


# Markdown


def cells_of(line: str) -> list[str]:
    """The cells of a line of a GitHub table: cut at bars that no backslash stands before, then without backslashes."""
    cells, cell, escaped = [], "", False
    for letter in line.strip().removeprefix("|").removesuffix("|"):
        if escaped or letter not in "\\|":
            cell, escaped = cell + letter, False
        elif letter == "\\":
            escaped = True
        else:
            cells.append(cell.strip())
            cell = ""
    return [*cells, cell.strip()]


def test_markdown_is_a_table_of_as_many_cells_in_each_line() -> None:
    lines = report_of(*blocks(2, "q_proj"), row(HOSTILE)).to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [len(cells_of(line)) for line in table] == [len(WORDS)] * 5
    assert cells_of(table[0]) == WORDS
    assert cells_of(table[1])[0] == ":--"
    assert cells_of(table[2])[0] == "model.layers.0.attn.q_proj"
    assert "model.layers.0.attn.q_proj" in table[2], "a plain name stays readable in the source"
    assert cells_of(table[4])[0] == HOSTILE


def test_names_are_no_markup_in_markdown() -> None:
    name = "a\nb <b> [x](y) `c` *d* _e_ f_g"
    text = report_of(row(name), skipped=(SkippedLayer(name, "x", "why"),)).to_markdown()
    assert text.count(r"a b \<b\> \[x\](y) \`c\` \*d\* \_e\_ f_g") == 2


def test_markdown_has_the_remarks_as_lists() -> None:
    text = report_of(row(), skipped=(SkippedLayer("head", "Linear", "it is the output layer"),)).to_markdown()
    assert text.endswith("Not adapted: 1 layer\n\n- head: it is the output layer\n")


# JSON


def test_json_is_valid_and_has_null_for_what_is_no_number() -> None:
    found = report_of(
        row(HOSTILE, share=math.nan, angles=(math.nan,), rotation=math.inf), skipped=(SkippedLayer("a", "b", "c"),)
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(found.to_json(), parse_constant=refuse)
    assert content.keys() == {"rows", "skipped", "trained_in_full", "skipped_parameters"}
    (only,) = content["rows"]
    assert (only["path"], only["share"], only["angles"], only["rotation"]) == (HOSTILE, None, [None], None)
    assert content["skipped"] == [{"path": "a", "layer_type": "b", "reason": "c", "targeted": False}]


def test_json_says_what_the_rows_say() -> None:
    found = report(adapted())
    content = json.loads(found.to_json(indent=2))
    assert content["rows"] == found.to_dicts()
    assert content["rows"][0]["angles"] == list(found.rows[0].angles)
    assert [layer["path"] for layer in content["skipped"]] == ["1"]


# notebooks


class Reader(HTMLParser):
    """The tags of a page, and its text; each tag closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.styles = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        assert all(name in ("style", "scope") for name, _ in attrs), attrs
        self.styles += "".join(value or "" for name, value in attrs if name == "style")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_notebook_shows_every_row_and_no_tag_of_the_models() -> None:
    rows = [*blocks(3, "q_proj"), row(HOSTILE, adapter=HOSTILE, layer_type=HOSTILE, graph_reason=HOSTILE)]
    page = Reader(report_of(*rows, skipped=(SkippedLayer(HOSTILE, HOSTILE, HOSTILE),))._repr_html_())
    assert set(page.tags) == {
        *("div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"),
        *("details", "summary", "ul", "li"),
    }
    assert page.tags.count("tr") == 5
    # In the heading, in three cells, and in two footnotes, one with the layer and the reason.
    assert page.text.count(HOSTILE) == 1 + 3 + 1 + 2
    assert all(entry.path in page.text for entry in rows)


def test_a_notebook_is_readable_on_light_and_on_dark() -> None:
    """It sets no color of text, and no background that is not half-transparent."""
    page = Reader(report_of(*blocks(3, "q_proj"))._repr_html_())
    assert ";color:" not in page.styles
    assert not page.styles.startswith("color:")
    assert "#" not in page.styles
    assert "rgba(" in page.styles


def test_a_notebook_of_no_angles_and_of_nan() -> None:
    unknown = row(mean_angle=math.nan, angle=math.nan, share=math.nan, weight_change=math.nan)
    page = report_of(row(mean_angle=0.0, weight_change=0.0), unknown)._repr_html_()
    assert "gradient" not in page
    assert "nan°" in page


def test_an_empty_report_has_every_form() -> None:
    for text in (str(report_of()), report_of().to_markdown(), report_of()._repr_html_()):
        assert "0 adapted layers" in text
    assert json.loads(report_of().to_json()) == {
        "rows": [],
        "skipped": [],
        "trained_in_full": [],
        "skipped_parameters": [],
    }
