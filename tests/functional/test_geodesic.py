"""Part of an adapter's rotation, against dense rotations of known planes by known angles."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from one_layer import F64, normal
from oracles import dense_product, relative_error
from torch import Tensor

from hra_fx.errors import AdapterError
from hra_fx.functional.geodesic import fractional_rotation

ALPHAS = [0.0, 1e-9, 0.1, 0.25, 0.5, 0.9, 1.0]
SPECIAL = [0.0, 1e-12, 1e-8, 1e-4, 0.5, math.pi / 4, math.pi / 2, 3 * math.pi / 4, 2.0, -2.0, 3.0]

seeds = st.integers(0, 2**31 - 1)
alphas = st.floats(0, 1)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def identity(d: int) -> Tensor:
    return torch.eye(d, dtype=F64)


def rotation(seed: int, d: int, angles: list[float], alpha: float = 1) -> Tensor:
    """`exp(alpha S): (d, d)` for the generator `S` that turns `len(angles)` random orthogonal planes by `angles`.

    In closed form, plane by plane: `torch.matrix_exp` is off by up to 3e-11 in float64.
    """
    basis, q = torch.linalg.qr(normal(seed, d, d)).Q, identity(d)
    for i, angle in enumerate(angles):
        x, y = basis[:, 2 * i], basis[:, 2 * i + 1]
        q += math.sin(alpha * angle) * (torch.outer(y, x) - torch.outer(x, y))
        q -= 2 * math.sin(alpha * angle / 2) ** 2 * (torch.outer(x, x) + torch.outer(y, y))
    return q


def reflections_of(q: Tensor) -> Tensor:
    """A chain of a dense rotation `Q: (d, d)`: reflections map one column after another to its unit vector."""
    eye, rest, vectors = identity(len(q)), q, []
    for j in range(len(q)):
        column = rest[:, j]
        head, below = float(column[j]), float(column[j + 1 :].norm())
        if head > 0 and below < 1e-14:
            continue
        vector = column - eye[:, j]
        # The rows above are zero up to rounding. Subtracting a head near 1 from 1 would cancel.
        vector[:j] = 0
        vector[j] = -(below**2) / (1 + head) if head > 0 else head - 1
        vectors.append(vector)
        rest = dense_product(vector[:, None]) @ rest
    return torch.stack(vectors, dim=1) if vectors else eye[:, :0]


def part(chain: Tensor, alpha: float) -> Tensor:
    """`Q(alpha): (d, d)`. Also checks what the docstring promises for the returned chain."""
    result = fractional_rotation(chain, alpha)
    assert result.shape == chain.shape
    assert result.dtype == chain.dtype
    assert not result.requires_grad
    ones = torch.ones(result.shape[1], dtype=F64)
    assert torch.allclose(result.double().norm(dim=0), ones, rtol=0, atol=16 * torch.finfo(chain.dtype).eps)
    return dense_product(result)


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm())


def assert_a_path(chain: Tensor, a: float = 0.3, b: float = 0.45) -> None:
    """From `I` to `Q`, orthogonal, additive and commuting with `Q`."""
    q, eye = dense_product(chain), identity(chain.shape[0])
    at_a = part(chain, a)
    assert distance(part(chain, 0), eye) < 1e-12
    assert distance(part(chain, 1), q) < 1e-10
    assert distance(at_a.mT @ at_a, eye) < 1e-12
    assert distance(at_a @ part(chain, b), part(chain, a + b)) < 1e-9
    assert distance(part(chain, 0.5) @ part(chain, 0.5), q) < 1e-9
    assert distance(at_a @ q, q @ at_a) < 1e-10
    assert float(torch.linalg.det(at_a)) == pytest.approx(1, abs=1e-10)


# Against known planes and angles


@quick
@given(
    st.lists(st.sampled_from(SPECIAL) | st.floats(-3.1, 3.1), max_size=6),
    st.integers(0, 4),
    seeds,
    alphas,
)
# Several planes by exactly pi / 2: the eigenvalues of a plane must not be split between the halves.
@example([math.pi / 2] * 3, 0, 0, 0.5)
@example([math.pi / 2] * 3, 2, 1, 0.3)
def test_any_angles_below_pi_are_scaled(angles: list[float], more: int, seed: int, alpha: float) -> None:
    d = max(1, 2 * len(angles) + more)
    chain = reflections_of(rotation(seed, d, angles))
    assert distance(part(chain, alpha), rotation(seed, d, angles, alpha)) < 1e-12


@pytest.mark.parametrize(("angles", "pairs"), [([0.7, 2.9, 1.5], 1), ([0.7, 2.9, 1.5], 7), ([], 16)])
def test_pairs_that_cancel_stay_pairs_of_equal_vectors(angles: list[float], pairs: int) -> None:
    """Also with more vectors than dimensions."""
    idle = normal(3, 8, pairs).repeat_interleave(2, dim=1)
    chain = torch.cat([idle, reflections_of(rotation(2, 8, angles)), idle], dim=1)
    for alpha in ALPHAS:
        assert distance(part(chain, alpha), rotation(2, 8, angles, alpha)) < 1e-13
    rest = fractional_rotation(chain, 0.5)[:, 2 * len(angles) :]
    assert rest.shape[1] >= 4 * pairs and torch.equal(rest[:, ::2], rest[:, 1::2])


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)], ids=str
)
def test_narrow_chains_are_as_accurate_as_their_dtype(dtype: torch.dtype, bound: float) -> None:
    angles = [0.01, 0.5, 1.0, 2.0]
    chain = reflections_of(rotation(4, 32, angles)).to(dtype)
    for alpha in ALPHAS:
        assert distance(part(chain, alpha), rotation(4, 32, angles, alpha)) < bound


# Every chain with an even number of reflections has a path


@quick
@given(st.integers(1, 24), st.integers(0, 17), st.sampled_from(ALPHAS) | alphas, seeds)
def test_any_chain_has_a_path(d: int, half: int, a: float, seed: int) -> None:
    assert_a_path(normal(seed, d, 2 * half), a, (1 - a) / 2)


@quick
@given(st.integers(2, 16), st.integers(1, 8), st.floats(0, 16), st.floats(0, 0.55), seeds)
def test_half_turns_and_nearly_parallel_vectors_have_a_path(
    d: int, half: int, exponent: float, a: float, seed: int
) -> None:
    """`I - 2 V V^T` turns planes by pi; the noise makes angles of pi less anything, down to rounding."""
    basis = torch.linalg.qr(normal(seed, d, min(d // 2, half) * 2)).Q
    noise = 10**-exponent * normal(seed + 1, *basis.shape)
    assert_a_path(basis + noise, a)
    assert_a_path(basis[:, :1] + noise, a)
    assert_a_path(torch.cat([basis, normal(seed + 2, len(basis), 2)], dim=1))


def test_zero_columns_and_the_lengths_of_the_others_do_not_matter() -> None:
    chain, zeros = normal(12, 6, 4), torch.zeros(6, 1, dtype=F64)
    padded = torch.cat([zeros, chain[:, :1], zeros, chain[:, 1:], zeros], dim=1)
    found = fractional_rotation(padded, 0.3)
    assert torch.equal(found[:, :4], fractional_rotation(chain, 0.3))
    assert torch.equal(found[:, 4], found[:, 5]) and found[:, 4].norm() == pytest.approx(1)
    assert not found[:, 6].any()  # the seventh has no partner
    assert all(torch.equal(fractional_rotation(zero, 0.5), zero) for zero in (torch.zeros(5, k) for k in (0, 1, 4)))
    scaled = chain * torch.tensor([2.0**-1000, 2.0**900, -1.0, 3.0], dtype=F64)
    assert relative_error(part(scaled, 0.4), part(chain, 0.4)) < 1e-13


def test_it_is_a_constant_in_every_context() -> None:
    chain = normal(19, 8, 4).float().requires_grad_()
    kept, wanted = chain.detach().clone(), fractional_rotation(chain, 0.5)
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        result = fractional_rotation(chain, 0.5)
    assert not wanted.requires_grad and torch.equal(result, wanted) and torch.equal(chain, kept)


# Errors


REFUSED: list[tuple[Tensor, float, str]] = [
    (normal(20, 6, 3), 0.5, "an odd number of reflections (determinant -1) has no path from the identity. Train with"),
    (normal(21, 6, 4) * torch.tensor([1, 1, 0, 1]), 1.0, "an odd number of reflections"),
    (normal(23, 6, 4).index_fill(0, torch.tensor([2]), math.inf), 0.5, "the vectors have NaN or infinite values. Load"),
]


@pytest.mark.parametrize(("chain", "alpha", "message"), REFUSED, ids=range(len(REFUSED)))
def test_errors(chain: Tensor, alpha: float, message: str) -> None:
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}"):
        fractional_rotation(chain, alpha)
