"""Every format: each adapted layer exactly once, nothing written if an error is raised, reproducible bytes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_models import MAKERS, Residual, drawing, drawn
from reading_pictures import layers_in
from torch import nn

import hra_fx
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.opening import Options
from hra_fx.view.picture import rendered
from hra_fx.view.theme import clean

READABLE = ("svg", "mmd", "dot", "graphml")


def written(found: Drawing, folder: Path, **options: Any) -> Iterable[tuple[str, Counter[str]]]:
    """For each readable format, how often it names each adapted layer."""
    for ending in READABLE:
        file = folder / f"a.{ending}"
        file.write_bytes(rendered(file, found, Options(**options)))
        yield ending, Counter(layers_in(file))


@pytest.mark.parametrize("options", [{}, {"depth": 1}, {"heat": "mean_angle"}], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_every_adapted_layer_is_in_every_format_exactly_once(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    paths = {clean(row.path) for row in drawing(name).rows}
    for ending, found in written(drawing(name), tmp_path, **options):
        assert {path: found[path] for path in paths} == dict.fromkeys(paths, 1), ending


def test_a_focus_has_the_layers_of_its_module(tmp_path: Path) -> None:
    for ending, found in written(drawing("resnet"), tmp_path, focus="layer2"):
        for path in {row.path for row in drawing("resnet").rows}:
            assert found[path] == path.startswith("layer2."), (ending, path)


def test_one_call_of_an_untraced_model_has_every_layer_once(tmp_path: Path) -> None:
    recorded = drawing_of(drawn("bert"), (torch.zeros(1, 3, dtype=torch.long),))
    for ending, found in written(recorded, tmp_path):
        assert all(found[row.path] == 1 for row in recorded.rows), ending


@pytest.mark.parametrize("depth", [None, 0])
def test_a_plain_model_is_drawn_too(depth: int | None, tmp_path: Path) -> None:
    for ending, _ in written(drawing_of(nn.Sequential(Residual(), nn.Linear(4, 4))), tmp_path, depth=depth):
        text = (tmp_path / f"a.{ending}").read_text(encoding="utf-8")
        assert "Linear 4→4" in text.replace("\\u2192", "→"), ending
        assert "adapter" not in text.replace("no adapters", ""), ending


@pytest.mark.parametrize("ending", ["svg", "png", "mmd", "dot", "graphml"])
def test_the_same_model_gives_the_same_bytes(ending: str, tmp_path: Path) -> None:
    first = hra_fx.visualize(drawn("shared"), tmp_path / f"a.{ending}", heat="angle").read_bytes()
    again = hra_fx.visualize(drawn("shared"), str(tmp_path / f"b.{ending.upper()}"), heat="angle").read_bytes()
    assert first == again


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.svg.gz", ".svg"])
def test_other_endings_are_refused_with_those_that_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(hra_fx.VisualizeError, match=r"Use one of \.svg .*\.png .*\.html .*\.mmd"):
        hra_fx.visualize(drawn("one layer"), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_other_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)  # as if it was not installed
    wanted = r"needs the package resvg-py.*pip install 'hra-fx\[png\]'.*no other package: \.svg \([^)]*\), \.html"
    with pytest.raises(hra_fx.VisualizeError, match=wanted):
        hra_fx.visualize(drawn("one layer"), tmp_path / "a.png")


def test_errors_leave_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    long = tmp_path / ("m" * 245 + ".svg")  # the name of the temporary file is too long
    for file in (tmp_path / "a.svg", long):
        file.write_text("before")
    for path, options, message in (
        (tmp_path / "nowhere" / "a.svg", {}, r"^path: the folder '.*nowhere' does not exist"),
        (tmp_path / "folder.svg", {}, r"^path: '.*folder\.svg' is a folder"),
        (tmp_path / "a.svg", {"focus": "nowhere"}, "no module 'nowhere'"),
        (long, {}, r"^path: cannot write "),
    ):
        with pytest.raises(hra_fx.VisualizeError, match=message):
            hra_fx.visualize(drawn("one layer"), path, **options)  # type: ignore[arg-type]
    assert {file.name for file in tmp_path.iterdir()} == {"folder.svg", "a.svg", long.name}
    assert (tmp_path / "a.svg").read_text() == long.read_text() == "before"
