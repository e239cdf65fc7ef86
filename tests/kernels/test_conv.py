"""Adapted convolutions with frozen weights against the dense oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from one_layer import BF16, CONVOLUTIONS, F32, F64, adapted, normal
from oracles import dense_q, relative_error
from torch import Tensor, nn

import hra_fx
from hra_fx.kernels.conv import conv_projections

quick = settings(max_examples=40, deadline=None, derandomize=True)


def frozen(layer: nn.Module, r: int = 3, **options: Any) -> Any:
    model = adapted(layer, r, **options)
    model.requires_grad_(False)
    model[0].hra_u["default"].requires_grad_()
    return model


def oracle(layer: Any, vectors: Tensor, x: Tensor, *, apply_GS: bool = False, anchor: Tensor | None = None) -> Tensor:
    weight = layer.hra_base.double()
    turned = (weight.flatten(1) @ dense_q(vectors, apply_GS=apply_GS, anchor=anchor)).view_as(weight)
    bias = None if layer.bias is None else layer.bias.double()
    output: Tensor = layer._conv_forward(x.double(), turned, bias)
    return output


def is_fused(output: Tensor) -> bool:
    """Whether the fused node computed the projections."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node: Any = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [function for function, _ in node.next_functions]
    return any(node.name() == "_ConvProjectionsBackward" for node in seen)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_outputs_and_gradients_of_every_geometry(name: str) -> None:
    layer = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, **CONVOLUTIONS[name]}, dtype=F64)
    r, apply_GS = min(3, layer.weight[0].numel()), list(CONVOLUTIONS).index(name) % 2 == 0
    model = frozen(layer, r, apply_GS=apply_GS)
    x = normal(1, 2, layer.in_channels, 9, 11).requires_grad_()
    box = model[0].hra_u
    output = model(x)
    assert is_fused(output)
    wanted = oracle(model[0], box["default"], x, apply_GS=apply_GS, anchor=box.anchor("default"))
    assert relative_error(output, wanted) < 1e-11
    upstream = normal(2, *output.shape)
    asked = (x, box["default"])
    for found, sought in zip(
        torch.autograd.grad(output, asked, upstream), torch.autograd.grad(wanted, asked, upstream), strict=True
    ):
        assert relative_error(found, sought, floor=1e-3) < 1e-9


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 6, 3, dtype=F64), nn.Conv3d(4, 6, 2, groups=2, dtype=F64)], ids=str)
def test_other_dimensions(layer: Any) -> None:
    model = frozen(layer)
    x = normal(1, 2, 4, *[5] * (layer.weight.dim() - 2)).requires_grad_()
    output, vectors = model(x), model[0].hra_u["default"]
    assert is_fused(output)
    wanted = oracle(model[0], vectors, x, anchor=model[0].hra_u.anchor("default"))
    assert relative_error(output, wanted) < 1e-11
    found, sought = (torch.autograd.grad(one.square().sum(), vectors)[0] for one in (output, wanted))
    assert relative_error(found, sought) < 1e-9


@quick
@given(
    d=st.integers(1, 20),
    out=st.integers(1, 9),
    k=st.integers(1, 22),
    scale=st.integers(-90, 90),
    seed=st.integers(0, 99),
)
def test_the_two_projections_and_their_gradient(d: int, out: int, k: int, scale: int, seed: int) -> None:
    vectors = (normal(seed, d, k) * 10.0**scale).requires_grad_()
    weight = normal(seed + 1, out, d)
    down, up = conv_projections(vectors, weight)
    turned, wanted = weight + up @ down, weight @ dense_q(vectors)
    assert relative_error(turned, wanted) < 1e-11
    upstream = normal(seed + 2, out, d)
    found, sought = (torch.autograd.grad(one, vectors, upstream)[0] for one in (turned, wanted))
    assert relative_error(found * 10.0**scale, sought * 10.0**scale, floor=1e-1) < 1e-9


def test_a_gradient_of_the_gradient() -> None:
    vectors, weight = normal(1, 6, 3).requires_grad_(), normal(2, 4, 6)
    assert torch.autograd.gradgradcheck(lambda u: conv_projections(u, weight), (vectors,))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    model = frozen(nn.Conv2d(16, 24, 3, dtype=BF16), 4)
    x, vectors = normal(1, 2, 16, 9, 9, dtype=BF16), model[0].hra_u["default"]
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        output = model(x)
    assert vectors.dtype == F32
    assert is_fused(output)
    wanted = oracle(model[0], vectors, x)
    assert relative_error(output, wanted) < 6e-3
    upstream = normal(2, *output.shape, dtype=BF16)
    found = torch.autograd.grad(output, vectors, upstream)[0]
    assert relative_error(found, torch.autograd.grad(wanted, vectors, upstream.double())[0]) < 6e-3


def trained(model: Any) -> None:
    model[0].hra_base.requires_grad_()


def hooked(model: Any) -> None:
    model[0].hra_u.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [trained, hooked])
def test_a_trained_weight_or_a_hook_uses_the_plain_formula(change: Any) -> None:
    model, x = frozen(nn.Conv2d(2, 3, 3, dtype=F64)), normal(1, 2, 2, 5, 5)
    change(model)
    assert not is_fused(model(x))


def test_outputs_can_be_modified_in_place() -> None:
    model, x = frozen(nn.Conv2d(2, 3, 3, dtype=F64)), normal(1, 2, 2, 5, 5).requires_grad_()
    output, vectors = model(x), model[0].hra_u["default"]
    output[:, 0] = 0
    output.add_(1).relu_()
    plain = oracle(model[0], vectors, x, anchor=model[0].hra_u.anchor("default"))
    wanted = (torch.cat([torch.zeros_like(plain[:, :1]), plain[:, 1:]], dim=1) + 1).relu()
    assert relative_error(output, wanted) < 1e-12
    found, sought = (torch.autograd.grad(one.sum(), vectors)[0] for one in (output, wanted))
    assert relative_error(found, sought) < 1e-10


@pytest.mark.parametrize("grouped", [1, 2])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("shape", [(4, 9, 8), (3, 4, 9, 8), (0, 4, 9, 8)])
def test_any_batch_with_and_without_gradients(shape: tuple[int, ...], wanted: bool, grouped: int) -> None:
    model = frozen(nn.Conv2d(4, 6, 3, padding=1, groups=grouped, dtype=F64))
    vectors = model[0].hra_u["default"]
    for seed in range(3):
        x = normal(seed, *shape)
        with torch.set_grad_enabled(wanted):
            found = model(x)
        assert found.requires_grad is wanted
        assert relative_error(found, oracle(model[0], vectors, x), floor=1e-3) < 1e-12


def test_cached_projections_follow_the_vectors_and_the_weight() -> None:
    model, x = frozen(nn.Conv2d(4, 6, 3, dtype=F64), 4), normal(1, 2, 4, 7, 7)
    layer, vectors = model[0], model[0].hra_u["default"]
    with torch.no_grad():
        for change in range(4):
            assert relative_error(model(x), oracle(layer, vectors, x)) < 1e-12
            if change == 0:
                vectors.data.copy_(normal(7, *vectors.shape))  # does not change its version
            elif change == 1:
                layer.hra_base.data.copy_(normal(8, *layer.hra_base.shape))
            elif change == 2:
                hra_fx.set_scale(model, "default", 0.0)
                assert torch.equal(model(x), layer._conv_forward(x, layer.hra_base, layer.bias))
                hra_fx.set_scale(model, "default", 1.0)


def test_the_same_bits_with_and_without_gradients() -> None:
    for dtype in (F64, F32, BF16):
        model, x = frozen(nn.Conv2d(8, 5, 3, dtype=dtype)), normal(1, 2, 8, 7, 7, dtype=dtype)
        trained = model(x)
        with torch.no_grad():
            assert torch.equal(model(x), trained)


@pytest.mark.parametrize("wanted", [False, True])
def test_the_memory_format_of_the_output_is_that_of_the_layer(wanted: bool) -> None:
    model = frozen(nn.Conv2d(4, 6, 3, dtype=F64)).to(memory_format=torch.channels_last)
    x = normal(1, 2, 4, 7, 7).to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(wanted):
        found = model(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(found, oracle(model[0], model[0].hra_u["default"], x)) < 1e-12
