"""The statistic of the speed benchmark, against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
from speed.ratios import Ratio, median, ranks_outside, ratio

ONES = [1.0] * 9


@pytest.mark.parametrize(
    ("own", "peer", "wanted"),
    [
        # Pairs 2, 1, 0.5, 3, 1. The medians are 4 and 2, whose ratio is 2.
        ([4.0, 2.0, 1.0, 6.0, 9.0], [2.0, 2.0, 2.0, 2.0, 9.0], Ratio(median=1.0, low=0.5, high=3.0, rounds=5)),
        # What slows a whole round changes nothing.
        ([4.0, 20.0, 1.0, 6.0, 9.0], [2.0, 20.0, 2.0, 2.0, 9.0], Ratio(median=1.0, low=0.5, high=3.0, rounds=5)),
        ([1.0, 2.0, 3.0, 8.0], ONES[:4], Ratio(median=2.5, low=1.0, high=8.0, rounds=4)),
        ([None, 2.0, 3.0, 4.0], [1.0, None, 1.0, 2.0], Ratio(median=2.5, low=2.0, high=3.0, rounds=2)),
        ([float(k) for k in range(1, 10)], ONES, Ratio(median=5.0, low=2.0, high=8.0, rounds=9)),
        ([None, 1.0], [1.0, None], None),
        ([], [], None),
    ],
)
def test_the_ratio_is_the_median_of_pairs(
    own: list[float | None], peer: list[float | None], wanted: Ratio | None
) -> None:
    """Over the rounds in which both took part; the interval of nine pairs leaves out the least and the largest."""
    assert ratio(own, peer) == wanted


def test_rounds_that_do_not_belong_together_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("count", "outside"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (10, 1), (12, 2), (40, 13)])
def test_the_interval_is_that_of_the_sign_test(count: int, outside: int) -> None:
    assert ranks_outside(count) == outside
    below = sum(math.comb(count, k) for k in range(outside + 1)) / 2**count
    assert count < 6 or below <= 0.025 < below + math.comb(count, outside + 1) / 2**count


def test_noise_is_how_far_the_interval_reaches_from_one() -> None:
    assert Ratio(1.0, 0.96, 1.02, 9).off_one == pytest.approx(0.04)
    assert Ratio(1.01, 1.005, 1.015, 9).off_one == pytest.approx(0.015)


def test_the_median_of_a_method_is_over_the_rounds_it_took_part_in() -> None:
    assert median([3.0, None, 1.0, 2.0]) == 2.0
    assert median([None]) is None
