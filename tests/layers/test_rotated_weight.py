"""`layer.weight` of an adapted layer: `W Q` for every reader, computed when it is used."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from adapting import config
from layers.checking import assert_same, normal, rotation, run_dense, turned, vectors_of
from layers.reading_weights import X, assert_gradients, dense, functional, layer_pair, linear, weight_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.pytorch_utils import Conv1D

import hra_fx

F64 = torch.float64

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": linear,
    "Conv1d": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "Conv2d": lambda: nn.Conv2d(4, 6, (3, 2)),
    "Conv3d": lambda: nn.Conv3d(2, 4, (1, 2, 3)),
    "Conv1D": lambda: Conv1D(4, 6),
    "attention": lambda: nn.MultiheadAttention(6, 2),
}
kinds = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
modes = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])


# ---- values ----


@kinds
@pytest.mark.parametrize("fields", [{"r": 2}, {"r": 3}, {"r": 2, "apply_GS": True}], ids=["even", "odd", "GS"])
def test_the_value_is_the_dense_product(make: Callable[[], nn.Module], fields: dict[str, Any]) -> None:
    base, layer = layer_pair(make, **fields)
    wanted, plain = dense(base, layer), weight_of(base)
    with torch.no_grad():
        assert_same(weight_of(layer).clone(), wanted)
    assert_gradients(weight_of(layer) * 2, wanted * 2, [layer.hra_u["default"]])
    assert torch.equal(layer.hra_base, plain)
    assert float((wanted - plain).detach().abs().max()) > 1e-3
    for same in (weight_of(layer).clone(), weight_of(layer).detach().clone(), weight_of(layer).data + 0):
        assert_same(same, wanted)
    assert type(weight_of(layer) + 0) is type(weight_of(layer).data + 0) is Tensor


def test_the_dtype_of_a_narrow_weight_is_kept() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        base, layer = layer_pair(dtype=dtype)
        assert layer.weight.dtype == layer.weight.clone().dtype == dtype
        # One rounding of W Q, which is computed in float32.
        assert_same(layer.weight.clone(), dense(base, layer), rtol=torch.finfo(dtype).eps)


def test_numpy_and_lists() -> None:
    base, layer = layer_pair()
    wanted = dense(base, layer).detach()
    with pytest.raises(RuntimeError, match="requires grad"):
        layer.weight.numpy()
    assert_same(torch.from_numpy(layer.weight.detach().numpy()), wanted)
    with torch.no_grad():
        assert_same(torch.from_numpy(layer.weight.numpy()), wanted)
        assert_same(torch.from_numpy(np.asarray(layer.weight)), wanted)
        assert_same(torch.from_dlpack(layer.weight), wanted)
        assert_same(torch.tensor(layer.weight.tolist(), dtype=F64), wanted)
    assert_same(torch.stack([*layer.weight]), wanted)
    assert layer.weight[1, 2].item() == pytest.approx(float(wanted[1, 2]), abs=1e-12)


# ---- gradients ----


def test_functional_reads_pass_gradients_to_every_adapter() -> None:
    base, model = functional()
    hra_fx.add_adapter(model, "other", config("read", "both", r=2, apply_GS=True))
    hra_fx.set_adapter(model, ["default", "other"])
    with torch.no_grad():
        for vectors in vectors_of(model, "other").values():
            vectors.copy_(normal(5, *vectors.shape))
    leaves = [*vectors_of(model).values(), *vectors_of(model, "other").values()]
    assert len(leaves) == 5
    assert_gradients(model(X), run_dense(base, model, X, adapters=("default", "other")), leaves)


def test_a_base_weight_that_is_trained_gets_its_gradient() -> None:
    base, layer = layer_pair()
    layer.weight.requires_grad_(True)
    plain = weight_of(base).detach().requires_grad_()
    wanted = turned(base, plain, rotation(nn.ModuleDict({"layer": layer}), "layer"))
    (F.linear(X, layer.weight) * normal(2, 3, 4)).sum().backward()
    (F.linear(X, wanted) * normal(2, 3, 4)).sum().backward()
    assert_same(layer.hra_base.grad, plain.grad)


@modes
def test_requires_grad_and_grad_are_those_of_the_base_weight(grad: bool) -> None:
    _, layer = layer_pair()
    parameter = layer._parameters["weight"]
    with torch.set_grad_enabled(grad):
        weight = layer.weight
        assert weight.requires_grad_() is weight
        assert parameter.requires_grad and layer.weight.requires_grad
        layer.weight.requires_grad_(False)
        assert not parameter.requires_grad and not layer.weight.requires_grad
        layer.weight.requires_grad = True
        assert parameter.requires_grad
        assert not layer.weight.detach().requires_grad and layer.weight.detach().grad is None
        assert layer.weight.grad is None
        parameter.grad = torch.ones_like(parameter)
        assert layer.weight.grad is parameter.grad
        layer.weight.grad = None
        assert parameter.grad is None


def test_a_weight_read_without_gradients_is_not_used_with_them() -> None:
    base, layer = layer_pair()
    with torch.no_grad():
        weight = layer.weight
    with pytest.raises(hra_fx.AdapterError, match=r"below autograd.*Call it under torch\.no_grad\(\)"):
        F.linear(X, weight)
    with torch.no_grad():
        assert_same(F.linear(X, weight), X @ dense(base, layer).mT)
    layer.hra_u.requires_grad_(False)
    assert_same(F.linear(X, weight), X @ dense(base, layer).mT)


# ---- writes ----


def assign_data(w: Any) -> None:
    w.data = torch.zeros_like(w)


def assign_item(w: Any) -> None:
    w[0] = 0


def add_assign(w: Any) -> None:
    w += 1


WRITES: dict[str, Callable[[Any], Any]] = {
    "add_": lambda w: w.add_(1),
    "data.copy_": lambda w: w.data.copy_(torch.zeros(4, 6)),
    "data =": assign_data,
    "w[0] =": assign_item,
    "+=": add_assign,
    "out=": lambda w: torch.add(torch.ones(4, 6, dtype=F64), 1, out=w),
    "init.normal_": lambda w: nn.init.normal_(w),
    "a row": lambda w: w[0].zero_(),
}


@modes
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_are_refused(write: Callable[[Any], Any], grad: bool) -> None:
    base, layer = layer_pair()
    with torch.set_grad_enabled(grad):
        with pytest.raises(hra_fx.AdapterError) as caught:
            write(layer.weight)
        assert re.match(r"Linear\.weight: \S+ writes into the weight of an adapted layer, ", str(caught.value))
        assert "Write to `layer.hra_base`, or call hra_fx.fold(model) first." in str(caught.value)
        assert torch.equal(layer.hra_base, base.weight)
        assert_same(layer.weight.clone(), dense(base, layer))


@pytest.mark.parametrize("factor", [4, torch.tensor(4.0, dtype=F64)])
def test_a_weight_can_be_scaled_by_a_number(factor: Any) -> None:
    """As RWKV does when it changes between train and eval mode."""
    base, layer = layer_pair()
    with torch.no_grad():
        layer.weight.mul_(factor)
        torch.mul(layer.hra_base, 2, out=layer.hra_base)
        layer.weight.detach().div_(factor)
        base.weight.mul_(2)
    assert torch.equal(layer.hra_base, base.weight)
    assert_same(layer(X), F.linear(X, dense(base, layer), base.bias))
    with pytest.raises(RuntimeError, match="leaf"):
        layer.weight.requires_grad_().mul_(factor)  # as for a parameter
    with torch.no_grad(), pytest.raises(hra_fx.AdapterError, match="computed as W Q"):
        layer.weight.div_(0.25, rounding_mode="floor")
    layer.hra_base.requires_grad_(False)
    with pytest.raises(hra_fx.AdapterError, match="computed as W Q"):
        layer.weight.mul_(torch.ones(4, 6, dtype=F64))


@modes
def test_values_that_are_copied_by_data_or_into_a_file(grad: bool) -> None:
    base, layer = layer_pair()
    wanted = dense(base, layer).detach()
    with torch.set_grad_enabled(grad):
        other = nn.Linear(6, 4).double()
        other.weight.data = layer.weight.data
        assert_same(other.weight, wanted)
        plain = torch.zeros(4, 6, dtype=F64)
        plain.data = layer.weight.detach()
        assert_same(plain, wanted)
        kept = layer.weight.detach()
        for weight in (kept, layer.weight.data):
            saved = safetensors.torch.load(safetensors.torch.save({"w": weight}))
            assert_same(saved["w"], wanted)
        with torch.no_grad():
            layer.hra_u["default"].neg_().add_(1.0)
        assert_same(kept * 1, wanted)  # the values of then


class Multiply(torch.autograd.Function):
    """A product with a backward of its own, as fused losses have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.mT @ x


@pytest.mark.parametrize("trained", [False, True])
def test_a_custom_autograd_function_passes_gradients(trained: bool) -> None:
    base, layer = layer_pair()
    layer.hra_base.requires_grad_(trained)
    x = X.flatten(0, -2).clone().requires_grad_()
    found, wanted = Multiply.apply(x, layer.weight), x @ dense(base, layer).mT
    assert_gradients(found, wanted, [x, layer.hra_u["default"]])
    if trained:
        q = rotation(nn.ModuleDict({"layer": layer}), "layer")
        sought = torch.autograd.grad((x @ (layer.hra_base @ q).mT).sum(), layer.hra_base)[0]
        (got,) = torch.autograd.grad(Multiply.apply(x, layer.weight).sum(), layer.hra_base)
        assert_same(got, sought)


def test_writes_into_the_base_weight_are_seen() -> None:
    base, layer = layer_pair()
    with torch.no_grad():
        for one in (layer.hra_base, base.weight):
            one[0] = 7.0
            one.mul_(2)
    assert_same(layer.weight.clone(), dense(base, layer))
    layer.hra_base = nn.Parameter(normal(4, 4, 6))
    base.weight = nn.Parameter(normal(4, 4, 6))
    assert layer.hra_base is layer._parameters["weight"]
    assert_same(layer(X), F.linear(X, dense(base, layer), base.bias))


def test_assigning_a_weight_that_is_read_as_rotated_is_refused() -> None:
    """Otherwise `layer.weight = f(layer.weight)`, as the fusion of a BatchNorm has it, would be rotated twice."""
    _, layer = layer_pair()
    before = layer.hra_base
    message = r"^Linear\.weight is read as W Q, .* Assign the base weight W to `layer\.hra_base`, or call hra_fx\.fold"
    with pytest.raises(hra_fx.AdapterError, match=message):
        torch.nn.utils.fusion.fuse_linear_bn_eval(layer, nn.BatchNorm1d(4).double().eval())
    with pytest.raises(hra_fx.AdapterError, match=message):
        layer.weight = nn.Parameter(normal(4, 4, 6))
    layer.weight = before
    assert layer.hra_base is before


@modes
def test_a_rotated_weight_does_not_become_a_parameter(grad: bool) -> None:
    base, layer = layer_pair()
    with torch.set_grad_enabled(grad):
        for weight in (layer.weight, layer.weight.data):
            with pytest.raises(hra_fx.AdapterError, match=r"layer\.weight\.detach\(\)\.clone\(\)"):
                nn.Parameter(weight)
        assert_same(nn.Parameter(layer.weight.detach().clone()), dense(base, layer))


REPARAMETRIZATIONS: dict[str, Callable[[nn.Module], object]] = {
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "spectral_norm": parametrizations.spectral_norm,
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
}


@pytest.mark.parametrize("act", REPARAMETRIZATIONS.values(), ids=REPARAMETRIZATIONS)
def test_reparametrizing_an_adapted_layer_is_refused(act: Callable[[nn.Module], object]) -> None:
    base, layer = layer_pair()
    with pytest.raises(hra_fx.AdapterError):
        act(layer)
    assert torch.equal(layer.hra_base, base.weight)


def test_weight_norm_fails_at_the_latest_when_the_layer_is_called() -> None:
    _, layer = layer_pair()
    with pytest.raises(
        hra_fx.AdapterError, match=r"weight_norm, pruning or similar was applied after hra_fx\.transform"
    ):
        parametrizations.weight_norm(layer)(X)
