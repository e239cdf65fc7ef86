"""Reflected rows as one autograd node against the dense oracle, and the cached factors without gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from one_layer import BF16, F32, F64, adapted, normal
from oracles import dense_q, relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad

import hra_fx
from hra_fx.kernels import inference
from hra_fx.layers.variants import reflected_rows

quick = settings(max_examples=40, deadline=None, derandomize=True)


def oracle(x: Tensor, vectors: Tensor) -> Tensor:
    return x.double() @ dense_q(vectors).mT


def leaf(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return normal(seed, *shape, dtype=dtype).requires_grad_()


def name_of(value: Tensor) -> str:
    assert value.grad_fn is not None
    return value.grad_fn.name()


@quick
@given(
    n=st.integers(0, 9),
    d=st.integers(1, 24),
    k=st.integers(1, 26),
    scale=st.integers(-140, 140),
    seed=st.integers(0, 99),
)
def test_rows_and_both_gradients_at_any_size_and_length(n: int, d: int, k: int, scale: int, seed: int) -> None:
    x, vectors = leaf(seed, n, d), normal(seed + 1, d, k)
    vectors = (vectors * 10.0**scale).requires_grad_()
    upstream = normal(seed + 2, n, d)
    got = torch.autograd.grad(reflected_rows(x, vectors), (x, vectors), upstream)
    wanted = torch.autograd.grad(oracle(x, vectors), (x, vectors), upstream)
    assert relative_error(got[0], wanted[0], floor=1e-3) < 1e-11
    # In one dimension Q does not depend on the vectors.
    assert relative_error(got[1] * 10.0**scale, wanted[1] * 10.0**scale, floor=1e-1) < 1e-9


@pytest.mark.parametrize("lengths", [(1.0, 1e-25), (1e25, 1.0), (1e-25, 1e-25), (0.0, 1.0), (1e-9, 1e9)])
def test_lengths_beyond_the_range_of_float32(lengths: tuple[float, float]) -> None:
    x, directions = leaf(1, 5, 16, dtype=F32), normal(2, 16, 2, dtype=F32)
    vectors = (directions * torch.tensor(lengths)).requires_grad_()
    y = reflected_rows(x, vectors)
    y.backward(normal(3, 5, 16, dtype=F32))
    assert relative_error(y, oracle(x, vectors)) < 1e-6
    assert vectors.grad is not None
    assert bool(torch.isfinite(vectors.grad).all())


def test_it_is_one_node_that_saves_rows_vectors_and_skinny_matrices_only() -> None:
    x, vectors = leaf(1, 4, 7, 32), leaf(2, 32, 3)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = reflected_rows(x, vectors)
    assert name_of(y) == "_ReflectRowsBackward"
    assert {tuple(tensor.shape) for tensor in saved} == {(4, 7, 32), (32, 3), (3, 3), (3, 28)}


def test_only_the_gradients_that_are_asked_for() -> None:
    x, vectors = normal(1, 5, 8), leaf(2, 8, 2)
    reflected_rows(x, vectors).sum().backward()
    wanted = torch.autograd.grad(oracle(x, vectors).sum(), vectors)[0]
    assert relative_error(vectors.grad, wanted) < 1e-12
    x, vectors = leaf(1, 5, 8), normal(2, 8, 2)
    reflected_rows(x, vectors).sum().backward()
    wanted = torch.autograd.grad(oracle(x, vectors).sum(), x)[0]
    assert relative_error(x.grad, wanted) < 1e-12


def test_a_gradient_of_the_gradient() -> None:
    x, vectors = leaf(1, 3, 5), leaf(2, 5, 3)
    assert torch.autograd.gradgradcheck(reflected_rows, (x, vectors))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided", "one row", "none"])
def test_rows_and_gradients_in_any_layout(layout: str) -> None:
    rows = {
        "expanded": normal(1, 1, 8).expand(6, 8),
        "transposed": normal(1, 8, 6).mT,
        "strided": normal(1, 6, 16)[:, ::2],
        "one row": normal(1, 8),
        "none": normal(1, 2, 0, 8),
    }[layout]
    vectors = leaf(2, 8, 3)
    y = reflected_rows(rows, vectors)
    upstream = normal(3, 1).expand(y.shape)
    got = torch.autograd.grad(y, vectors, upstream)[0]
    wanted = torch.autograd.grad(oracle(rows, vectors), vectors, upstream)[0]
    assert relative_error(y, oracle(rows, vectors), floor=1.0) < 1e-12
    assert relative_error(got, wanted, floor=1.0) < 1e-12


def test_rows_that_are_modified_before_the_backward_are_an_error() -> None:
    x, vectors = leaf(1, 5, 8), leaf(2, 8, 2)
    made = x * 1
    y = reflected_rows(made, vectors)
    made.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_under_autocast_products_are_narrow_and_rows_are_not() -> None:
    x, vectors = leaf(1, 6, 64, dtype=F32), leaf(2, 64, 4, dtype=F32)
    with torch.autocast("cpu", dtype=BF16):
        y = reflected_rows(x, vectors)
        y.sum().backward()
    assert y.dtype == F32
    assert relative_error(y, oracle(x, vectors)) < 5e-3
    ones = torch.ones(6, 64, dtype=F64)
    wanted = torch.autograd.grad(oracle(x, vectors), (x, vectors), ones)
    assert relative_error(x.grad, wanted[0]) < 5e-3
    assert relative_error(vectors.grad, wanted[1]) < 1e-2
    # What is added to the rows is small where the reflections do little: the rows themselves keep their digits.
    pair = vectors.detach()[:, :1].repeat(1, 2)
    with torch.autocast("cpu", dtype=BF16):
        assert relative_error(reflected_rows(x, pair), x) < 1e-6


# Transforms and tracers get the plain formula


def test_functorch_transforms_and_forward_mode() -> None:
    x, vectors = normal(1, 4, 8), normal(2, 8, 3)
    each = torch.vmap(torch.func.grad(lambda u, row: reflected_rows(row, u).square().cos().sum()), (None, 0))
    got = each(vectors, x)
    for row, gradient in zip(x, got, strict=True):
        asked = vectors.clone().requires_grad_()
        wanted = torch.autograd.grad(oracle(row, asked).square().cos().sum(), asked)[0]
        assert relative_error(gradient, wanted) < 1e-10
    tangent = normal(3, 8, 3)
    with forward_ad.dual_level():
        pushed = forward_ad.unpack_dual(reflected_rows(x, forward_ad.make_dual(vectors, tangent))).tangent
    step = 1e-6
    moved = (oracle(x, vectors + step * tangent) - oracle(x, vectors - step * tangent)) / (2 * step)
    assert relative_error(pushed, moved) < 1e-8


def test_make_fx_traces_operators() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x, vectors = normal(1, 4, 8), normal(2, 8, 3)
    graph = make_fx(reflected_rows)(x, vectors)
    assert relative_error(graph(2 * x, -3 * vectors), oracle(2 * x, vectors)) < 1e-12
    other = normal(4, 8, 3)
    assert relative_error(graph(x, other), oracle(x, other)) < 1e-12, "nothing of the first vectors is a constant"


# Cached factors


def layer(r: int = 4, **options: Any) -> Any:
    model = adapted(nn.Linear(12, 6, dtype=F64), r, **options)
    return model.requires_grad_(False)


def wanted_of(model: Any, x: Tensor) -> Tensor:
    box = model[0].hra_u
    spec = box.specs["default"]
    turned = dense_q(box["default"].detach(), apply_GS=spec.apply_GS, anchor=box.anchor("default"))
    return nn.functional.linear(x @ turned.mT, model[0].hra_base, model[0].bias)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    original = inference.scaled_chain_and_factor

    def counted(*args: Any) -> Any:
        calls.append("computed")
        return original(*args)

    monkeypatch.setattr(inference, "scaled_chain_and_factor", counted)
    return calls


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"apply_GS": True}, {"r": 3, "init_weights": True}])
def test_factors_are_computed_once_for_the_same_vectors(
    monkeypatch: pytest.MonkeyPatch, guard: Any, options: dict[str, Any]
) -> None:
    calls, model = counting(monkeypatch), layer(**options)
    for seed, rows in enumerate([(1,), (1, 1), (3, 5)]):
        x = normal(seed, *rows, 12)
        with guard():
            assert relative_error(model(x), wanted_of(model, x)) < 1e-12
    assert calls == ["computed"]


def test_changes_of_adapter_strength_and_dtype_are_noticed() -> None:
    model, x = layer(), normal(1, 3, 12)
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=2, target_modules=["0"], init_weights=False))
    box = model[0].hra_u
    one, two = dense_q(box["default"].detach()), dense_q(box["other"].detach())

    def is_turned_by(q: Tensor, dtype: torch.dtype = F64) -> bool:
        plain = nn.functional.linear(x @ q.mT, model[0].hra_base.double(), model[0].bias.double())
        return relative_error(model(x.to(dtype)), plain) < (1e-12 if dtype == F64 else 1e-5)

    with torch.no_grad():
        assert is_turned_by(one)
        for names, q in ((["other"], two), (["default", "other"], one @ two), (["other", "default"], two @ one)):
            hra_fx.set_adapter(model, names)
            assert is_turned_by(q)
        with hra_fx.disable_adapters(model):
            assert is_turned_by(torch.eye(12, dtype=F64))
        hra_fx.set_adapter(model, "default")
        hra_fx.set_scale(model, "default", 0.0)
        assert is_turned_by(torch.eye(12, dtype=F64))
        hra_fx.set_scale(model, "default", 1.0)
        assert is_turned_by(one)
        model.float()
        assert is_turned_by(one, F32)


def test_copies_and_state_dicts_do_not_contain_the_cache() -> None:
    model, x = layer(), normal(1, 3, 12)
    keys = set(model.state_dict())
    with torch.no_grad():
        model(x)
        other = copy.deepcopy(model)
        other[0].hra_u["default"].copy_(normal(5, 12, 4))
        for one in (model, other, model):
            assert relative_error(one(x), wanted_of(one, x)) < 1e-12
    assert set(model.state_dict()) == keys


def test_nothing_is_cached_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model = counting(monkeypatch), layer()
    model[0].hra_u["default"].requires_grad_()
    model(normal(1, 3, 12)).sum().backward()
    assert calls == []
