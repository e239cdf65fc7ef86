"""The speed benchmark: its statistic, who is measured when, its targets, its page and the picture in README.md."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from speed import grid
from speed.page import page
from speed.ratios import Ratio, ranks_outside, ratio
from speed.readme_plot import LOOKS, SIZES, main, ratios
from speed.results import Cell, Results
from speed.setting import Setting
from speed.target_report import as_text
from speed.targets import TARGETS, findings
from speed.timing import Budget, Measured, Step, clocked, interleave

ONES = [1.0] * 9


@pytest.mark.parametrize(
    ("own", "peer", "wanted"),
    [
        # Pairs 2, 1, 0.5, 3, 1. The medians are 4 and 2, whose ratio is 2.
        ([4.0, 2.0, 1.0, 6.0, 9.0], [2.0, 2.0, 2.0, 2.0, 9.0], Ratio(median=1.0, low=0.5, high=3.0, rounds=5)),
        # What slows a whole round changes nothing.
        ([4.0, 20.0, 1.0, 6.0, 9.0], [2.0, 20.0, 2.0, 2.0, 9.0], Ratio(median=1.0, low=0.5, high=3.0, rounds=5)),
        ([None, 2.0, 3.0, 4.0], [1.0, None, 1.0, 2.0], Ratio(median=2.5, low=2.0, high=3.0, rounds=2)),
        ([float(k) for k in range(1, 10)], ONES, Ratio(median=5.0, low=2.0, high=8.0, rounds=9)),
        ([None, 1.0], [1.0, None], None),
    ],
)
def test_the_ratio_is_the_median_of_pairs(
    own: list[float | None], peer: list[float | None], wanted: Ratio | None
) -> None:
    """Over the rounds in which both took part; the interval of nine pairs leaves out the least and the largest."""
    assert ratio(own, peer) == wanted


@pytest.mark.parametrize(("count", "outside"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (10, 1), (12, 2), (40, 13)])
def test_the_interval_is_that_of_the_sign_test(count: int, outside: int) -> None:
    assert ranks_outside(count) == outside
    below = sum(math.comb(count, k) for k in range(outside + 1)) / 2**count
    assert count < 6 or below <= 0.025 < below + math.comb(count, outside + 1) / 2**count


def counting(name: str, calls: list[str]) -> Step:
    return Step(lambda _: calls.append(name))


def one_second(step: Step) -> float:
    step.run(None)
    return 1.0


def test_each_counted_step_comes_after_an_uncounted_one_of_the_same_method() -> None:
    calls: list[str] = []
    steps = {name: counting(name, calls) for name in "abc"}
    measured = interleave(steps, Budget(seconds=0, least=4), one_second)
    warm_up, rounds = calls[:6], calls[6:]
    assert warm_up == list("aabbcc")
    assert len(rounds) == 4 * 3 * 2
    assert rounds[::2] == rounds[1::2]
    in_rounds = [rounds[6 * turn : 6 * turn + 6 : 2] for turn in range(4)]
    assert all(sorted(names) == list("abc") for names in in_rounds)
    assert len({tuple(names) for names in in_rounds}) > 1, "each round has a new random order"
    assert measured.values == {name: [1.0] * 4 for name in "abc"}


def test_a_method_that_fails_is_left_out_with_the_reason() -> None:
    def fail(_: object) -> None:
        raise ValueError("no such kernel\nand more")

    measured = interleave({"a": Step(fail), "b": Step(lambda _: None)}, Budget(seconds=0, least=2), clocked)
    assert measured.left_out == {"a": "ValueError: no such kernel"}
    assert list(measured.values) == ["b"]


def measured_in(index: int, own: float, peer: float, control: float = 1.0) -> Results:
    """A run in which one target was measured, thrice."""
    target = TARGETS[index]
    values: dict[str, list[float | None]] = {target.own: [own] * 3, target.peer: [peer] * 3}
    if target.control:
        values[target.control] = [control * peer] * 3
    return Results({"run": "full"}, [Cell(target.setting, Measured(values))])


@pytest.mark.parametrize(
    ("control", "own", "limit", "verdict"),
    [
        (None, 1.0, "1.000", "met"),
        (None, 1.01, "1.000", "not met"),
        (0.97, 1.02, "1.030", "met"),
        (0.97, 1.04, "1.030", "not met"),
        (1.5, 1.04, "1.050", "met, unsure"),
        (1.5, 1.06, "1.050", "not met, unsure"),
    ],
)
def test_a_target_is_met_up_to_its_limit_plus_the_noise_of_a_control(
    control: float | None, own: float, limit: str, verdict: str
) -> None:
    """Of the noise, five percent at most."""
    place = next(index for index, target in enumerate(TARGETS) if bool(target.control) is (control is not None))
    found = findings(measured_in(place, own, 1.0, control=control or 1.0))[place]
    assert TARGETS[place].limit == 1.0
    assert found.verdict == verdict
    assert f"{own:.3f}, {own:.3f} to {own:.3f}, 3 pairs; limit {limit}" in as_text([found])


def test_both_runs_measure_all_targets_and_the_short_one_nothing_else() -> None:
    needed: dict[Setting, set[str]] = {}
    for target in TARGETS:
        methods = {target.own, target.peer, target.control or target.peer}
        needed[target.setting] = needed.get(target.setting, set()) | methods
    assert {job.setting: set(job.methods) for job in grid.quick()} == needed
    measured = {job.setting: set(job.methods) for job in grid.full()}
    assert all(methods <= measured[setting] for setting, methods in needed.items())


@pytest.mark.parametrize(
    ("about", "doubt"),
    [
        ({"load average at start": 1.5, "cores": 2}, "busy (load average 1.5 at the start, 2 cores)"),
        ({"load average at start": 0.4, "cores": 2, "measured": "everything"}, ""),
    ],
)
def test_a_page_says_what_makes_it_unsure(about: dict[str, object], doubt: str) -> None:
    text = page(Results({"run": "full", **about}))
    assert doubt in text
    assert ("**The" in text or "**Only" in text) is bool(doubt)


DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "benchmarks.md").read_text(encoding="utf-8")


def texts(file: Path) -> list[str]:
    return ["".join(element.itertext()) for element in ET.parse(file).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_published_picture_has_the_numbers_of_the_table(theme: str) -> None:
    words = texts(DOCS / f"speed-{theme}.svg")
    for curve in ratios(PAGE).values():
        for value in curve.values():
            assert (f"{value:.1f}×" if value >= 10 else f"{value:.2f}×") in words
    assert {*LOOKS, *(f"{size} tokens" for size in SIZES)} <= set(words)


def test_it_is_written_for_both_themes(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.md").write_text(PAGE, encoding="utf-8")
    main(tmp_path)
    for theme in ("light", "dark"):
        assert (tmp_path / f"speed-{theme}.svg").read_bytes() == (DOCS / f"speed-{theme}.svg").read_bytes()
