"""Every format: each adapted layer exactly once, nothing written where something is refused, the same bytes twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from drawn_models import MAKERS, Residual, drawn
from reading_pictures import sites_in
from torch import Tensor, nn

import hra_fx
from hra_fx.view.formats import FORMATS, Format, picture_file, renderer
from hra_fx.view.text import clean

READABLE = ("svg", "mmd", "dot", "graphml", "json")


def sites(model: nn.Module) -> list[str]:
    return [clean(path) for path in dict.fromkeys(row.path for row in hra_fx.report(model))]


@pytest.mark.parametrize("depth", [None, 1])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("ending", READABLE)
def test_every_adapted_layer_is_in_every_format_exactly_once(
    ending: str, name: str, depth: int | None, tmp_path: Path
) -> None:
    file = hra_fx.visualize(drawn(name), tmp_path / f"a.{ending}", depth=depth)
    found = Counter(sites_in(file))
    assert {path: found[path] for path in sites(drawn(name))} == dict.fromkeys(sites(drawn(name)), 1)


@pytest.mark.parametrize("name", ["resnet", "bert", "two adapters", "hostile"])
@pytest.mark.parametrize("ending", READABLE)
def test_heat_loses_none(ending: str, name: str, tmp_path: Path) -> None:
    file = hra_fx.visualize(drawn(name), tmp_path / f"a.{ending}", heat="mean_angle")
    found = Counter(sites_in(file))
    assert all(found[path] == 1 for path in sites(drawn(name)))


@pytest.mark.parametrize("ending", READABLE)
def test_a_focus_has_the_sites_of_its_module(ending: str, tmp_path: Path) -> None:
    file = hra_fx.visualize(drawn("resnet"), tmp_path / f"a.{ending}", focus="layer2")
    found = Counter(sites_in(file))
    for path in sites(drawn("resnet")):
        assert found[path] == path.startswith("layer2."), path


@pytest.mark.parametrize("ending", ["svg", "png", "mmd", "dot", "graphml", "json"])
def test_the_same_model_gives_the_same_bytes(ending: str, tmp_path: Path) -> None:
    first = hra_fx.visualize(drawn("bert"), tmp_path / f"a.{ending}", heat="angle").read_bytes()
    again = hra_fx.visualize(drawn("bert"), str(tmp_path / f"b.{ending.upper()}"), heat="angle").read_bytes()
    assert first == again


@pytest.mark.parametrize("ending", READABLE)
@pytest.mark.parametrize("depth", [None, 0])
def test_a_plain_model_is_drawn_too(ending: str, depth: int | None, tmp_path: Path) -> None:
    file = hra_fx.visualize(nn.Sequential(Residual(), nn.Linear(4, 4)), tmp_path / f"a.{ending}", depth=depth)
    text = file.read_text(encoding="utf-8")
    assert "Linear 4→4" in text.replace("\\u2192", "→")
    assert "adapter" not in text.replace("no adapters", "")


@pytest.mark.parametrize("ending", READABLE)
def test_a_call_of_a_model_that_stays_python_is_drawn(ending: str, tmp_path: Path) -> None:
    model, ids = drawn("bert"), torch.zeros(1, 3, dtype=torch.long)
    file = hra_fx.visualize(model, tmp_path / f"a.{ending}", example_inputs=(ids,))
    found = Counter(sites_in(file))
    assert all(found[path] == 1 for path in sites(model))


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    model, x = drawn("shared"), torch.randn(3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    y: Tensor = model(x)
    for ending in READABLE:
        hra_fx.visualize(model, tmp_path / f"a.{ending}", depth=1, heat="share")
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("name", ["a.jpg", "a.pdf", "a", "a.svg.gz", ".svg", "a.mermaid"])
def test_other_endings_are_refused_with_those_that_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(hra_fx.VisualizeError, match=r"Use one of \.svg .*\.png .*\.html .*\.mmd"):
        hra_fx.visualize(drawn("one layer"), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named_with_what_works_without(tmp_path: Path) -> None:
    formats = {".svg": FORMATS[".svg"], ".png": Format("pixels", "hra_fx.view.png", "no_such_library", "png")}
    wanted = r"needs the package no-such-library.*pip install 'hra-fx\[png\]'.*without it are \.svg \([^)]*\)\.$"
    with pytest.raises(hra_fx.VisualizeError, match=wanted):
        picture_file(tmp_path / "a.png", formats)


def test_every_format_has_its_writer() -> None:
    for ending in FORMATS:
        assert callable(renderer(Path(f"a{ending}")))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    wanted = r"^path: the folder '.*nowhere' does not exist\. Create it, or choose another one\.$"
    with pytest.raises(hra_fx.VisualizeError, match=wanted):
        hra_fx.visualize(drawn("one layer"), tmp_path / "nowhere" / "a.svg")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.svg").mkdir()
    with pytest.raises(hra_fx.VisualizeError, match=r"^path: '.*a\.svg' is a folder\. Give the name of a file\.$"):
        hra_fx.visualize(drawn("one layer"), tmp_path / "a.svg")


def test_what_was_there_is_kept_where_something_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.svg"
    file.write_text("before")
    with pytest.raises(hra_fx.VisualizeError, match="no module 'nowhere'"):
        hra_fx.visualize(drawn("one layer"), file, focus="nowhere")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path) -> None:
    long = tmp_path / ("m" * 245 + ".svg")  # a name that fits, while the one beside it does not
    long.write_text("before")
    with pytest.raises(hra_fx.VisualizeError, match=r"could not be written.*What was there is unchanged"):
        hra_fx.visualize(drawn("one layer"), long)
    assert long.read_text() == "before"
    assert list(tmp_path.iterdir()) == [long]


def test_a_link_stays_one(tmp_path: Path) -> None:
    target, link = tmp_path / "real.svg", tmp_path / "a.svg"
    target.write_text("before")
    link.symlink_to(target)
    hra_fx.visualize(drawn("one layer"), link)
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8").startswith("<?xml")
