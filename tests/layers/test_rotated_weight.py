"""`layer.weight` of an adapted layer: `W Q` for every reader, computed when it is used; copied, saved and moved."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from adapting import config
from hypothesis import given, settings, strategies as st
from layers.checking import assert_same, check, check_fold, normal, pair, rotation, run_dense, turned, vectors_of
from layers.reading_weights import (
    TARGETS,
    USES,
    Reading,
    X,
    assert_gradients,
    dense,
    functional,
    layer_pair,
    linear,
    weight_of,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
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
@pytest.mark.parametrize("multiply", [F.linear, Multiply.apply], ids=["F.linear", "a custom function"])
def test_gradients_of_products(multiply: Callable[..., Tensor], trained: bool) -> None:
    base, layer = layer_pair()
    layer.weight.requires_grad_(trained)
    x = X.flatten(0, -2).clone().requires_grad_()
    plain = layer.hra_base if trained else weight_of(base).detach()
    wanted = x @ turned(base, plain, rotation(nn.ModuleDict({"layer": layer}), "layer")).mT
    assert_gradients(multiply(x, layer.weight), wanted, [x, layer.hra_u["default"], *[plain] * trained])


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


# ---- copies, and weights that a tool moves and stores again ----


@modes
def test_copies_of_a_weight(grad: bool) -> None:
    base, layer = layer_pair()
    wanted = dense(base, layer).detach().clone()
    with torch.set_grad_enabled(grad):
        twin, kept, other = copy.deepcopy(layer.weight), layer.weight.detach(), nn.Linear(6, 4).double()
        other.weight.data = layer.weight.data
        file = io.BytesIO()
        torch.save(kept, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True), pickle.loads(pickle.dumps(kept))
        saved = safetensors.torch.load(safetensors.torch.save({"w": kept, "data": layer.weight.data + 0}))
        with torch.no_grad():
            layer.hra_base.zero_()
        for same in (twin.clone(), *loaded, *saved.values(), other.weight, kept * 1):
            assert_same(same, wanted)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda w: w.to("cpu", F64),
    "copy": lambda w: w.to("cpu", copy=True),
    "cpu": lambda w: w.cpu(),
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.contiguous(),
    "double": lambda w: w.double(),
    "type": lambda w: w.type(F64),
}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(sorted(MOVES)), max_size=4), st.booleans(), st.booleans())
def test_a_moved_weight_that_is_stored_in_its_layer_is_the_base_weight(
    moves: list[str], grad: bool, trained: bool
) -> None:
    base, model = functional()
    for path in ("called", "read", "both"):
        layer = model.get_submodule(path)
        with torch.set_grad_enabled(grad):
            weight = layer.weight
            for move in moves:
                weight = MOVES[move](weight)
            if {*moves} <= {"data", "detach"}:  # the weight itself, which cannot be a leaf of autograd
                with pytest.raises(hra_fx.AdapterError, match=r"layer\.weight\.detach\(\)\.clone\(\)"):
                    nn.Parameter(weight)
                continue
            layer._parameters["weight"] = nn.Parameter(weight, requires_grad=trained)
        parameter = dict(model.named_parameters())[f"{path}.weight"]
        assert type(parameter) is nn.Parameter and parameter.requires_grad is trained
        assert torch.equal(parameter, base.get_submodule(path).weight)
    wanted = run_dense(base, model, X).detach()
    assert_same(model(X), wanted)
    assert_same(hra_fx.fold(model)(X), wanted)


@pytest.mark.parametrize("grad", [True, False])
def test_a_copy_in_another_module_is_the_rotated_weight_and_trains(grad: bool) -> None:
    base, layer = layer_pair()
    wanted = dense(base, layer).detach()
    other = nn.Linear(6, 4).double()
    with torch.set_grad_enabled(grad):
        other.weight = nn.Parameter(layer.weight.clone())
    for same in (other.weight, copy.deepcopy(other).weight, pickle.loads(pickle.dumps(other)).weight):
        assert isinstance(same, nn.Parameter) and same.requires_grad
        assert_same(same, wanted)
    (other(X) * 2).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.5).step()
    assert_same(other.weight, wanted - X.flatten(0, -2).sum(0).expand(4, 6))
    assert torch.equal(layer.hra_base, base.weight)


# ---- every reader of a weight gets `W Q` ----


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("branches", [False, True], ids=["traceable", "untraceable"])
def test_every_reader_gets_the_rotated_weight(use: str, branches: bool) -> None:
    base, model = pair(lambda: Reading(use, branches), TARGETS, apply_GS=branches)
    check(base, model, X)
    if not branches:
        graph = hra_fx.graphs(model)[""]
        assert_same(graph(X), run_dense(base, model, X))
    assert type(check_fold(base, model, X)) is Reading


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    base, model = functional()
    x = X.clone().requires_grad_()
    (checkpoint(model, x, use_reentrant=reentrant) * normal(3, 3, 6)).sum().backward()
    leaves = list(vectors_of(model).values())
    wanted = torch.autograd.grad((run_dense(base, model, X) * normal(3, 3, 6)).sum(), leaves)
    for leaf, oracle in zip(leaves, wanted, strict=True):
        assert_same(leaf.grad, oracle)


def test_a_replica_of_data_parallel_has_its_tensors_as_plain_attributes() -> None:
    base, model = functional()
    moved: Any = copy.deepcopy(base)
    with torch.no_grad():
        moved.read.weight.mul_(1.5)
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        twin = child._replicate_for_data_parallel()
        for key, parameter in child._parameters.items():
            twin._parameters.pop(key, None)
            setattr(twin, key, parameter * 1.5 if (name, key) == ("read", "weight") else parameter.view_as(parameter))
        replica._modules[name] = twin
    assert_gradients(replica(X), run_dense(moved, model, X), list(vectors_of(model).values()))
