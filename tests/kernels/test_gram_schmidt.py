"""Gram-Schmidt as one node, against the QR of PyTorch and its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from one_layer import BF16, F32, F64, normal
from oracles import relative_error
from torch import Tensor

from hra_fx.kernels.gram_schmidt import orthonormal_chain

quick = settings(max_examples=40, deadline=None, derandomize=True)


def q_of(chain: Tensor, r: int) -> Tensor:
    """`I - 2 V V^T` of the last columns."""
    basis = chain[:, chain.shape[1] - r :].double()
    return torch.eye(chain.shape[0], dtype=F64) - 2 * basis @ basis.mT


@quick
@given(d=st.integers(1, 20), r=st.integers(1, 20), a=st.integers(0, 3), seed=st.integers(0, 99))
def test_reflections_and_gradient(d: int, r: int, a: int, seed: int) -> None:
    r = min(r, d)
    vectors = normal(seed, d, r).requires_grad_()
    anchor = normal(seed + 1, d, a) if a else None
    chain = orthonormal_chain(vectors, anchor)
    assert chain.shape == (d, a + r)
    assert anchor is None or torch.equal(chain[:, :a], anchor)
    basis, triangle = torch.linalg.qr(vectors)
    positive = basis * triangle.diagonal().sign()
    assert relative_error(chain[:, a:], positive) < 1e-11
    sought = q_of(basis, r)
    assert relative_error(q_of(chain, r), sought) < 1e-11
    upstream = normal(seed + 2, d, d)
    (found,) = torch.autograd.grad(q_of(chain, r), vectors, upstream)
    (wanted,) = torch.autograd.grad(sought, vectors, upstream)
    assert relative_error(found, wanted, floor=1e-1) < 1e-8


@pytest.mark.parametrize("with_anchor", [False, True])
def test_gradients_of_both_orders(with_anchor: bool) -> None:
    vectors, anchor = normal(1, 7, 3).requires_grad_(), normal(2, 7, 2) if with_anchor else None
    assert torch.autograd.gradcheck(lambda u: orthonormal_chain(u, anchor), vectors)
    assert torch.autograd.gradgradcheck(lambda u: q_of(orthonormal_chain(u, anchor), 3), vectors)


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_narrow_vectors_are_made_orthonormal_in_float32(dtype: torch.dtype) -> None:
    vectors = normal(1, 30, 4, dtype=dtype).requires_grad_()
    anchor = normal(2, 30, 1, dtype=dtype)
    chain = orthonormal_chain(vectors, anchor)
    assert chain.dtype is (F64 if dtype is F64 else F32)
    basis = chain[:, 1:].detach().double()
    assert relative_error(basis.mT @ basis, torch.eye(4, dtype=F64)) < 1e-6
    chain.sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.dtype is dtype


def test_a_frozen_adapter_and_a_trained_one_reflect_alike() -> None:
    vectors = normal(1, 12, 3)
    frozen, trained = orthonormal_chain(vectors, None), orthonormal_chain(vectors.clone().requires_grad_(), None)
    assert torch.equal(frozen, trained)
