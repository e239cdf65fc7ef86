"""The performance targets: when they are met, and in which settings they are measured."""

from __future__ import annotations

import pytest
from speed import grid
from speed.page import page
from speed.results import Cell, Results
from speed.setting import Setting
from speed.target_report import as_text
from speed.targets import TARGETS, findings
from speed.timing import Measured


def measured_in(index: int, own: float, peer: float, control: float = 1.0) -> Results:
    """A run in which one target was measured, thrice."""
    target = TARGETS[index]
    values: dict[str, list[float | None]] = {target.own: [own] * 3, target.peer: [peer] * 3}
    if target.control:
        values[target.control] = [control * peer] * 3
    return Results({"run": "full"}, [Cell(target.setting, Measured(values))])


@pytest.mark.parametrize(("own", "verdict"), [(0.99, "met"), (1.0, "met"), (1.01, "not met")])
def test_a_target_is_met_up_to_its_limit(own: float, verdict: str) -> None:
    found = findings(measured_in(0, own, 1.0))
    assert TARGETS[0].limit == 1.0
    assert found[0].verdict == verdict
    assert f"| {'**not met**' if verdict == 'not met' else verdict} |" in page(measured_in(0, own, 1.0))


@pytest.mark.parametrize(("own", "verdict"), [(1.02, "met"), (1.04, "not met")])
def test_the_noise_of_a_control_is_added_to_the_limit(own: float, verdict: str) -> None:
    found = findings(measured_in(controlled(), own, 1.0, control=0.97))[controlled()]
    assert found.noise == pytest.approx(0.03)
    assert found.verdict == verdict
    assert f"{own:.3f}, {own:.3f} to {own:.3f}, 3 pairs; limit 1.030" in as_text([found])


@pytest.mark.parametrize(("own", "verdict"), [(1.04, "met, unsure"), (1.06, "not met, unsure")])
def test_of_noise_five_percent_are_added_at_most(own: float, verdict: str) -> None:
    found = findings(measured_in(controlled(), own, 1.0, control=1.5))[controlled()]
    assert found.verdict == verdict
    assert "limit 1.050" in as_text([found])


@pytest.mark.parametrize(
    ("values", "verdict"), [([0.9, 0.95, 1.1], "met, unsure"), ([0.9, 1.05, 1.1], "not met, unsure")]
)
def test_an_interval_on_both_sides_of_the_limit_is_unsure(values: list[float | None], verdict: str) -> None:
    target = TARGETS[0]
    cell = Cell(target.setting, Measured({target.own: values, target.peer: [1.0, 1.0, 1.0]}))
    assert findings(Results({"run": "full"}, [cell]))[0].verdict == verdict


def controlled() -> int:
    """The first target that has a control."""
    return next(index for index, target in enumerate(TARGETS) if target.control)


def test_both_runs_measure_all_targets_and_the_short_one_nothing_else() -> None:
    needed: dict[Setting, set[str]] = {}
    for target in TARGETS:
        methods = {target.own, target.peer, target.control or target.peer}
        needed[target.setting] = needed.get(target.setting, set()) | methods
    assert {job.setting: set(job.methods) for job in grid.quick()} == needed
    measured = {job.setting: set(job.methods) for job in grid.full()}
    assert all(methods <= measured[setting] for setting, methods in needed.items())
