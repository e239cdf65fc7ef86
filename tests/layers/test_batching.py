"""Factors in batches: how many there are, when a layer computes its own, and that both give the right gradients."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from layers.three_layers import Net, X, adapted, vectors_of, wanted
from one_layer import BF16, F32, F64, normal
from oracles import dense_q, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hra_fx

both = pytest.mark.parametrize("apply_GS", [False, True])
narrow = pytest.mark.filterwarnings("ignore:.*its trained vectors are torch.bfloat16:hra_fx.HRAWarning")


def assert_right(model: Any, found: Tensor, x: Tensor = X, *, apply_GS: bool = False) -> None:
    """The output and the gradients of all vectors are those of the oracle."""
    sought = wanted(model, x, apply_GS=apply_GS)
    assert relative_error(found, sought) < 1e-12
    pairs = zip(*(torch.autograd.grad(one.square().sum(), vectors_of(model)) for one in (found, sought)), strict=True)
    for one, other in pairs:
        assert relative_error(one, other, floor=1e-3) < 1e-9


@both
@pytest.mark.parametrize("init_weights", [False, True])
def test_outputs_and_gradients(apply_GS: bool, init_weights: bool) -> None:
    model = adapted(apply_GS=apply_GS, init_weights=init_weights)
    output = model(X)
    assert_right(model, output, apply_GS=apply_GS)
    with torch.no_grad():
        assert torch.equal(model(X), output)


@both
def test_a_layer_that_is_called_alone_computes_its_own(apply_GS: bool) -> None:
    model = adapted(apply_GS=apply_GS)
    output = model.three(torch.tanh(model.two(torch.tanh(model.one(X)))))
    assert_right(model, output, apply_GS=apply_GS)


def test_several_adapters_and_scales() -> None:
    model = adapted(r=2, init_weights=False)
    other = hra_fx.HRAConfig(r=2, target_modules=["one", "two"], init_weights=False, apply_GS=True)
    hra_fx.add_adapter(model, "other", other)
    hra_fx.set_adapter(model, ["default", "other"])
    hra_fx.set_scale(model, "default", 0.5)
    output = model(X)
    assert relative_error(output, hra_fx.fold(copy.deepcopy(model))(X)) < 1e-12
    hra_fx.set_scale(model, "other", 0.0)
    assert relative_error(model(X), hra_fx.fold(copy.deepcopy(model))(X)) < 1e-12


def test_layers_that_the_loss_does_not_reach_get_no_gradient() -> None:
    """As without batches: an optimizer moves parameters whose gradient is zero, by their momentum."""
    model = adapted()
    model.two.register_forward_hook(lambda layer, args, output: output.detach())
    model(X).sum().backward()
    assert [vectors.grad is None for vectors in vectors_of(model)] == [True, True, False]
    model = adapted()
    hidden: list[Tensor] = []
    model.one.register_forward_hook(lambda layer, args, output: hidden.append(output))
    model(X)
    hidden[0].sum().backward()
    assert [vectors.grad is None for vectors in vectors_of(model)] == [False, True, True]


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_factors_without_gradients_follow_every_change(guard: Any) -> None:
    model = adapted(r=2, init_weights=False)
    other = hra_fx.HRAConfig(r=2, target_modules="all-linear", exclude_modules=[], init_weights=False, apply_GS=True)
    hra_fx.add_adapter(model, "other", other)
    layers = (model.one, model.two, model.three)

    def assert_folded() -> None:
        with guard():
            found = [model(X) for _ in range(2)]
        twin: Any = copy.deepcopy(model)
        folded = hra_fx.fold(twin, list(twin.one.hra_u.active))(X)
        assert all(relative_error(one, folded) < 1e-12 for one in found)

    assert_folded()
    for layer in layers:
        layer.hra_u["other"].data.copy_(layer.hra_u["default"])
    hra_fx.set_adapter(model, "other")  # the same vectors, with Gram-Schmidt
    assert_folded()
    model.two.hra_u["other"].data[0] += 1.0  # does not change the version of the parameter
    assert_folded()
    with torch.inference_mode(False):
        model(X).sum().backward()


@both
def test_training_follows_the_oracle(apply_GS: bool) -> None:
    """Each step changes the vectors in place."""
    model = adapted(apply_GS=apply_GS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        assert_right(model, model(X), apply_GS=apply_GS)
        model(X).square().sum().backward()
        optimizer.step()


@both
@narrow
@pytest.mark.parametrize("away", ["no storage", "no shape", "another dtype"])
def test_vectors_that_a_tool_provides_only_while_a_layer_runs(apply_GS: bool, away: str) -> None:
    """As FSDP, DeepSpeed and layerwise casts do."""
    model = adapted(apply_GS=apply_GS)
    vectors = model.two.hra_u["default"]
    values = normal(60, *vectors.shape)
    if away == "another dtype":
        values = values.bfloat16().double()

    def provide(*_: object) -> None:
        if away == "no storage":
            vectors.untyped_storage().resize_(values.numel() * 8)
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(vectors):
                vectors.copy_(values)
        else:
            vectors.data = values.clone()

    def withdraw(*_: object) -> None:
        if away == "no storage":
            vectors.untyped_storage().resize_(0)
        else:
            vectors.data = values[0, :0] if away == "no shape" else values.bfloat16()

    withdraw()
    model.two.register_forward_pre_hook(provide)
    model.two.register_forward_hook(withdraw)
    found = model(X)
    provide()
    assert relative_error(found, wanted(model, X, apply_GS=apply_GS)) < 1e-12 if away != "another dtype" else 1e-6


class Checkpointed(Net):
    """Its first two layers run again in the backward, after the forward of the model."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        run = nn.Sequential(self.one, nn.Tanh(), self.two, nn.Tanh())
        return self.three(checkpoint(run, x, use_reentrant=self.reentrant))  # type: ignore[no-any-return]


@both
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_that_run_again_in_the_backward(
    monkeypatch: pytest.MonkeyPatch, reentrant: bool, apply_GS: bool, autocast: bool
) -> None:
    monkeypatch.setattr(Checkpointed, "reentrant", reentrant)
    dtype = F32 if autocast else F64
    model = adapted(Checkpointed, apply_GS=apply_GS, dtype=dtype)
    x = X.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        model(x).to(dtype).square().sum().backward()
    sought = torch.autograd.grad(wanted(model, x.double(), apply_GS=apply_GS).square().sum(), vectors_of(model))
    for vectors, gradient in zip(vectors_of(model), sought, strict=True):
        assert relative_error(vectors.grad, gradient, floor=1e-3) < (5e-2 if autocast else 1e-9)


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_gradients_inside_of_a_forward_without_them(outer: Any) -> None:
    """As classifier guidance asks for them."""
    model, found = adapted(), list[Tensor]()

    def guide(layer: nn.Module, args: Any, output: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            found.append(model.one(X.clone()))

    model.two.register_forward_hook(guide)
    with outer():
        model(X)
    weight = model.one.hra_base @ dense_q(model.one.hra_u["default"], anchor=model.one.hra_u.anchor("default"))
    sought = nn.functional.linear(X, weight, model.one.bias)
    got, right = (torch.autograd.grad(one.square().sum(), model.one.hra_u["default"])[0] for one in (found[0], sought))
    assert relative_error(got, right) < 1e-9


@both
def test_factors_are_float32_under_autocast(apply_GS: bool) -> None:
    model, x = adapted(apply_GS=apply_GS, dtype=F32), X.float()
    with torch.autocast("cpu", dtype=BF16):
        found = model(x)
    assert relative_error(found, wanted(model, X, apply_GS=apply_GS)) < 3e-2
    found.sum().backward()
    assert all(vectors.grad is not None and vectors.grad.dtype is F32 for vectors in vectors_of(model))


@both
@narrow
@pytest.mark.parametrize("swapped", [False, True])
def test_another_dtype_from_now_on(apply_GS: bool, swapped: bool) -> None:
    model = adapted(apply_GS=apply_GS, dtype=F32)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swapped)
    try:
        for dtype, tolerance in ((F32, 1e-5), (F64, 1e-12), (BF16, 5e-2), (F32, 1e-5)):
            model.to(dtype)
            found = model(X.to(dtype))
            assert relative_error(found, wanted(model, X, apply_GS=apply_GS)) < tolerance
            found.sum().backward()
            del found
            model.zero_grad()
            model.load_state_dict(model.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_a_model_called_within_another_and_in_another_thread() -> None:
    inner, outer = adapted(), adapted(init_weights=False)
    results: list[Tensor] = []
    outer.two.register_forward_hook(lambda *_: results.append(inner(X)))
    found = outer(X)
    thread = threading.Thread(target=lambda: results.append(inner(X)))
    thread.start()
    thread.join()
    assert_right(outer, found)
    for result in results:
        assert_right(inner, result)


def test_a_forward_that_is_interrupted() -> None:
    model = adapted()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.two.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    model.one.hra_u["default"].data.neg_().add_(1.0)
    assert_right(model, model.three(torch.tanh(model.two(torch.tanh(model.one(X))))))


class Island(nn.Module):
    """Computes in float32 under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            output: Tensor = self.layer(x)
            return output


def test_a_layer_in_a_wider_dtype_than_its_batch() -> None:
    model = hra_fx.transform(Island(), hra_fx.HRAConfig(r=4, target_modules=["layer"], init_weights=False))
    with torch.autocast("cpu", dtype=BF16):
        found = model(X.float())
    assert relative_error(found, model(X.float())) < 1e-6
