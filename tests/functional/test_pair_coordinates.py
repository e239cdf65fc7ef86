"""Pair coordinates as such; tests/training/test_pairs.py has them in an optimizer."""

import pytest
import torch

from hra_fx.functional.pairs import from_pairs, to_pairs


@pytest.mark.parametrize("rows", [0, 5])
def test_from_pairs_is_the_inverse_even_without_rows(rows: int) -> None:
    """With sharded vectors, a process may have no rows of a layer."""
    vectors = torch.randn(2, rows, 4, dtype=torch.float64)
    back = from_pairs(to_pairs(vectors.clone(), 1.5, 0.3), 1.5, 0.3)
    torch.testing.assert_close(back, vectors)
