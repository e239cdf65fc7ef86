"""The performance targets: when they are met, and in which settings they are measured."""

from __future__ import annotations

import pytest
from speed import grid
from speed.page import page
from speed.results import Cell, Results
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


@pytest.mark.parametrize(("own", "verdict"), [(0.99, "met"), (1.0, "met"), (1.01, "NOT met")])
def test_a_target_is_met_up_to_its_limit(own: float, verdict: str) -> None:
    found = findings(measured_in(0, own, 1.0))
    assert TARGETS[0].limit == 1.0
    assert found[0].verdict == verdict
    assert f"| {'**NOT met**' if verdict == 'NOT met' else verdict} |" in page(measured_in(0, own, 1.0))


@pytest.mark.parametrize(("own", "verdict"), [(1.02, "met"), (1.04, "NOT met")])
def test_the_noise_of_a_control_is_added_to_the_limit(own: float, verdict: str) -> None:
    found = findings(measured_in(controlled(), own, 1.0, control=0.97))[controlled()]
    assert found.noise == pytest.approx(0.03)
    assert found.verdict == verdict
    assert "1.00 + noise 3.0%" in as_text([found])
    assert "Noise between two copies of the base model (512 tokens, inference): 3.0%." in as_text([found])


@pytest.mark.parametrize(("own", "verdict"), [(1.04, "met, unsure"), (1.06, "NOT met, unsure")])
def test_of_noise_five_percent_are_added_at_most(own: float, verdict: str) -> None:
    found = findings(measured_in(controlled(), own, 1.0, control=1.5))[controlled()]
    assert found.verdict == verdict
    assert "1.00 + noise 5.0%" in as_text([found])


@pytest.mark.parametrize(
    ("values", "verdict"), [([0.9, 0.95, 1.1], "met, unsure"), ([0.9, 1.05, 1.1], "NOT met, unsure")]
)
def test_an_interval_on_both_sides_of_the_limit_is_unsure(values: list[float | None], verdict: str) -> None:
    target = TARGETS[0]
    cell = Cell(target.setting, Measured({target.own: values, target.peer: [1.0, 1.0, 1.0]}))
    assert findings(Results({"run": "full"}, [cell]))[0].verdict == verdict


def beside_the_base(own: float, base: list[float | None]) -> Results:
    """A run in which a target with PEFT's HRA was measured, the frozen base in the same rounds."""
    target = TARGETS[beside_hra()]
    peer: list[float | None] = [1.0] * len(base)
    values: dict[str, list[float | None]] = {"ours": [own] * len(base), "base": base, "peft-hra": peer}
    return Results({"run": "full"}, [Cell(target.setting, Measured(values))])


@pytest.mark.parametrize(
    ("own", "base", "verdict", "floor"),
    [
        (0.36, [0.33, 0.34, 0.34], "NOT met", "0.340 (0.330 to 0.340)"),
        (0.38, [0.36, 0.37, 0.39], "NOT met (nor by the frozen base)", "**0.370 (0.360 to 0.390)**"),
        (0.38, [0.33, 0.37, 0.39], "NOT met (nor by the frozen base, unsure)", "**0.370 (0.330 to 0.390)**"),
        (0.34, [0.36, 0.37, 0.39], "met", "**0.370 (0.360 to 0.390)**"),
    ],
)
def test_a_limit_below_the_floor_is_seen(own: float, base: list[float | None], verdict: str, floor: str) -> None:
    results = beside_the_base(own, base)
    found = findings(results)[beside_hra()]
    assert TARGETS[beside_hra()].limit == 0.35
    assert found.verdict == verdict
    shown = verdict if verdict == "met" else f"**{verdict}**"
    assert f"| 3 | 0.35 | {floor} | {shown} |" in page(results)
    assert f"3 pairs; limit 0.35; floor {floor.strip('*')}" in as_text([found])
    assert "The floor is the ratio of the frozen base model" in page(results)


def test_a_target_has_no_floor_where_the_base_is_the_peer_or_was_not_measured() -> None:
    values: dict[str, list[float | None]] = {"ours": [1.0], "base": [1.0], "lora": [2.0]}
    found = findings(Results({"run": "full"}, [Cell(TARGETS[0].setting, Measured(values))]))
    floors = {finding.target.peer: finding.floor for finding in found if finding.target.setting == TARGETS[0].setting}
    assert floors["base"] is floors["peft-hra"] is None
    assert floors["lora"] is not None
    assert floors["lora"].median == 0.5


def test_compiled_targets_have_the_compiled_base_as_their_floor() -> None:
    target = next(target for target in TARGETS if target.peer == "lora-inductor")
    values: dict[str, list[float | None]] = {
        target.own: [1.0],
        target.peer: [1.0],
        "base-inductor": [0.9],
        "base": [0.5],
    }
    found = findings(Results({"run": "full"}, [Cell(target.setting, Measured(values))]))[TARGETS.index(target)]
    assert found.floor is not None
    assert found.floor.median == 0.9


def beside_hra() -> int:
    """The first target whose peer is PEFT's HRA."""
    return next(index for index, target in enumerate(TARGETS) if target.peer == "peft-hra")


def controlled() -> int:
    """The first target that has a control."""
    return next(index for index, target in enumerate(TARGETS) if target.control)


def test_each_target_is_measured_by_both_runs() -> None:
    for make in (grid.quick, grid.full):
        jobs = {job.setting: set(job.methods) for job in make()}
        for target in TARGETS:
            assert {target.own, target.peer, target.control or target.peer} <= jobs[target.setting]
            assert target.peer != "peft-hra" or target.base in jobs[target.setting], (
                "a target with PEFT's HRA has its floor"
            )
