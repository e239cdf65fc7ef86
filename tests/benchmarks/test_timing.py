"""Who is measured when, with a clock that is made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from speed.timing import Budget, Step, attendance, clocked, interleave


def counting(name: str, calls: list[str]) -> Step:
    return Step(lambda _: calls.append(name))


def made_up(seconds: dict[str, float], calls: list[str]) -> Callable[[Step], float]:
    """A clock on which each method takes its seconds."""

    def measure(step: Step) -> float:
        step.run(None)
        return seconds[calls[-1]]

    return measure


def test_each_counted_step_comes_after_an_uncounted_one_of_the_same_method() -> None:
    calls: list[str] = []
    steps = {name: counting(name, calls) for name in "abc"}
    measured = interleave(steps, Budget(seconds=0, least=4), made_up(dict.fromkeys("abc", 1.0), calls))
    warm_up, rounds = calls[:6], calls[6:]
    assert warm_up == list("aabbcc")
    assert len(rounds) == 4 * 3 * 2
    assert rounds[::2] == rounds[1::2]
    in_rounds = [rounds[6 * turn : 6 * turn + 6 : 2] for turn in range(4)]
    assert all(sorted(names) == list("abc") for names in in_rounds)
    assert len({tuple(names) for names in in_rounds}) > 1, "each round has a new random order"
    assert measured.values == {name: [1.0] * 4 for name in "abc"}


def test_the_first_run_is_kept_apart_by_the_clock() -> None:
    seconds = iter([30.0, 1.0, 1.0, 9.0, 2.0])
    step = Step(lambda _: None, warm_ups=2)
    measured = interleave({"a": step}, Budget(seconds=1, least=1, most=1), lambda _: next(seconds))
    assert measured.values == {"a": [2.0]}
    assert 0 < measured.first["a"] < 1


def test_a_method_that_fails_is_left_out_with_the_reason() -> None:
    def fail(_: object) -> None:
        raise ValueError("no such kernel\nand more")

    measured = interleave({"a": Step(fail), "b": Step(lambda _: None)}, Budget(seconds=0, least=2), clocked)
    assert measured.left_out == {"a": "ValueError: no such kernel"}
    assert list(measured.values) == ["b"]


def test_the_budget_is_shared_by_all() -> None:
    # Two methods of one second, each with an uncounted step: four seconds a round.
    turns = attendance({"a": 1.0, "b": 1.0}, Budget(seconds=40))
    assert turns == {"a": [True] * 10, "b": [True] * 10}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 5), (1e6, 40)])
def test_rounds_are_bounded(seconds: float, rounds: int) -> None:
    assert len(attendance({"a": 1.0}, Budget(seconds))["a"]) == rounds


def test_a_slow_method_sits_most_rounds_out() -> None:
    # Of 80 seconds 60 are for 30 rounds of two seconds, 20 for the slow one: one run, which is less than the least.
    turns = attendance({"a": 1.0, "slow": 12.0}, Budget(seconds=80))
    assert turns["a"] == [True] * 30
    assert [turn for turn, there in enumerate(turns["slow"]) if there] == [0, 14, 29]
