"""What sites need of their vectors, made before the first of them runs: when, of which vectors, and never of old."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from one_layer import BF16, F32, F64, normal
from oracles import dense_q, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hra_fx
from hra_fx.kernels import gram_schmidt, prefetch as module, wy_factor as factors

Batches = list[tuple[str, int]]


class Net(nn.Module):
    """Three layers, two of one width."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12, dtype=dtype), nn.Linear(12, 7, dtype=dtype)
        self.three = nn.Linear(7, 5, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


def adapted(*, apply_GS: bool = False, r: int = 3, dtype: torch.dtype = F64, **settings: Any) -> Any:
    config = hra_fx.HRAConfig(r=r, apply_GS=apply_GS, target_modules="all-linear", exclude_modules=[], **settings)
    model = hra_fx.transform(Net(dtype), config)
    for seed, layer in enumerate((model.one, model.two, model.three)):
        with torch.no_grad():
            layer.hra_u["default"].copy_(normal(seed, *layer.hra_u["default"].shape))
    return model


def wanted(model: Any, x: Tensor, *, apply_GS: bool = False) -> Tensor:
    for layer in (model.one, model.two, model.three):
        box = layer.hra_u
        turned = layer.weight.double() @ dense_q(box["default"], apply_GS=apply_GS, anchor=box.anchor("default"))
        x = nn.functional.linear(x, turned, layer.bias.double())
        x = x if layer is model.three else torch.tanh(x)
    return x


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """For each call of what makes something ahead, its name and of how many sites."""
    found: Batches = []

    def counted(home: Any, name: str) -> None:
        original = getattr(home, name)

        def make(many: Any) -> Any:
            found.append((name, len(many)))
            return original(many)

        monkeypatch.setattr(home, name, make)

    counted(factors, "compute_factors")
    counted(gram_schmidt, "compute_qr")
    return found


X = normal(1, 4, 12)


@pytest.mark.parametrize("r", [1, 2, 3, 5])
def test_those_of_one_shape_are_made_in_one_go(batches: Batches, r: int) -> None:
    model = adapted(r=r, init_weights=False)
    model(X)  # watched, to see who reads weights
    model(X)
    batches.clear()
    model(X)
    assert batches == [("compute_factors", 2), ("compute_factors", 1)]
    batches.clear()
    with torch.no_grad():
        model(X)
        model(X)
    assert batches == [("compute_factors", 1)] * 3


def test_gram_schmidt_too(batches: Batches) -> None:
    model = adapted(apply_GS=True)
    for _ in range(2):
        model(X)
    batches.clear()
    assert relative_error(model(X), wanted(model, X, apply_GS=True)) < 1e-12
    assert [batch for batch in batches if batch[0] == "compute_qr"] == [("compute_qr", 2), ("compute_qr", 1)]


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize(("apply_GS", "init_weights"), [(False, False), (False, True), (True, True), (True, False)])
def test_the_same_bits_in_every_forward(dtype: torch.dtype, apply_GS: bool, init_weights: bool) -> None:
    model, x = adapted(apply_GS=apply_GS, init_weights=init_weights, dtype=dtype), X.to(dtype)
    runs = []
    for _ in range(4):
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        runs.append((output.detach(), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)))
    for later in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], later, strict=True))
    tolerance = {F64: 1e-12, F32: 1e-5, BF16: 5e-2}[dtype]
    assert relative_error(runs[0][0], wanted(model, x.double(), apply_GS=apply_GS)) < tolerance


@pytest.mark.parametrize("apply_GS", [False, True])
def test_training_follows_the_oracle(apply_GS: bool) -> None:
    """Vectors change in every step, in place."""
    model = adapted(apply_GS=apply_GS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    seen = []
    for _ in range(5):
        optimizer.zero_grad()
        vectors = [layer.hra_u["default"] for layer in (model.one, model.two, model.three)]
        sought = torch.autograd.grad(wanted(model, X, apply_GS=apply_GS).square().sum(), vectors)
        loss = model(X).square().sum()
        loss.backward()
        for vector, gradient in zip(vectors, sought, strict=True):
            assert relative_error(vector.grad, gradient, floor=1e-3) < 1e-9
        optimizer.step()
        seen.append(loss.item())
    assert len(set(seen)) == 5


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("way", ["replaced", "in place", "data", "numpy", "new data"])
def test_vectors_that_change_while_a_forward_runs(apply_GS: bool, way: str) -> None:
    model = adapted(apply_GS=apply_GS)
    for _ in range(3):
        model(X)
    box = model.two.hra_u

    def change(*_: object) -> None:
        other = normal(50, *box["default"].shape)
        if way == "replaced":
            box["default"] = nn.Parameter(other)
        elif way == "in place":
            with torch.no_grad():
                box["default"].copy_(other)
        elif way == "data":
            box["default"].data.copy_(other)
        elif way == "numpy":
            box["default"].detach().numpy()[:] = other.numpy()
        else:
            box["default"].data = other

    handle = model.two.register_forward_pre_hook(change)
    found = model(X)
    handle.remove()
    assert relative_error(found, wanted(model, X, apply_GS=apply_GS)) < 1e-12


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("away", ["no storage", "no shape", "another dtype", "other numbers"])
def test_vectors_that_a_tool_lends_to_a_layer_while_it_runs(apply_GS: bool, away: str) -> None:
    """As FSDP, DeepSpeed and casts of a layer do, none of which raises the version of a parameter."""
    model = adapted(apply_GS=apply_GS)
    vectors = model.two.hra_u["default"]
    held = normal(60, *vectors.shape)

    def give(*_: object) -> None:
        version = vectors._version
        if away == "no storage":
            vectors.untyped_storage().resize_(held.numel() * 8)
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(vectors):
                vectors.copy_(held)
        else:
            vectors.data = held.clone()
        assert vectors._version == version

    def take(*_: object) -> None:
        if away == "no storage":
            vectors.untyped_storage().resize_(0)
        else:
            empty = {"no shape": held[0, :0], "another dtype": held.bfloat16(), "other numbers": -held.flip(0)}
            vectors.data = empty[away].clone()

    take()
    model.two.register_forward_pre_hook(give)
    model.two.register_forward_hook(take)
    for step in range(4):
        found = model(X)
        give()
        assert relative_error(found, wanted(model, X, apply_GS=apply_GS)) < 1e-12
        take()
        held.copy_(normal(70 + step, *held.shape))


@pytest.mark.parametrize("apply_GS", [False, True])
def test_other_adapters(apply_GS: bool) -> None:
    model = adapted(apply_GS=apply_GS)
    for _ in range(3):
        model(X)
    before = model(X)
    config = hra_fx.HRAConfig(r=3, target_modules="all-linear", exclude_modules=[], init_weights=False)
    hra_fx.add_adapter(model, "other", config)
    hra_fx.set_adapter(model, "other")
    assert relative_error(model(X), before) > 1e-2
    hra_fx.set_adapter(model, "default")
    assert torch.equal(model(X), before)


def test_lengths_out_of_range_are_left_to_their_layer() -> None:
    model = adapted(dtype=F32, init_weights=False)
    with torch.no_grad():
        model.one.hra_u["default"].mul_(1e-25)
        model.three.hra_u["default"].mul_(1e25)
    for _ in range(4):
        assert relative_error(model(X.float()), wanted(model, X)) < 1e-5


def test_a_model_called_within_another() -> None:
    inner, outer = adapted(), adapted()

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return outer(x) + inner(x)

    both = Both()
    for _ in range(4):
        assert relative_error(both(X), wanted(outer, X) + wanted(inner, X)) < 1e-12
    handle = outer.two.register_forward_hook(lambda layer, args, output: output + inner(X).sum())
    for _ in range(4):
        found = outer(X)
    handle.remove()
    hidden = wanted(inner, X).sum()
    shifted = outer.two.register_forward_hook(lambda layer, args, output: output + hidden)
    assert relative_error(found, outer(X)) < 1e-12
    shifted.remove()


class Again(Net):
    """Its first two layers run again in the backward, after the forward of the model has ended."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        run = nn.Sequential(self.one, nn.Tanh(), self.two, nn.Tanh())
        return self.three(checkpoint(run, x, use_reentrant=self.reentrant))  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("apply_GS", [False, True])
def test_layers_that_run_again_in_the_backward(
    monkeypatch: pytest.MonkeyPatch, batches: Batches, reentrant: bool, apply_GS: bool
) -> None:
    monkeypatch.setattr(Again, "reentrant", reentrant)
    config = hra_fx.HRAConfig(r=2, apply_GS=apply_GS, target_modules="all-linear", exclude_modules=[])
    model: Any = hra_fx.transform(Again().double(), config)
    vectors = [layer.hra_u["default"] for layer in (model.one, model.two, model.three)]
    x = X.clone().requires_grad_()
    sought = torch.autograd.grad(wanted(model, x, apply_GS=apply_GS).square().sum(), vectors)
    for _ in range(4):
        model.zero_grad()
        batches.clear()
        model(x).square().sum().backward()
        for vector, gradient in zip(vectors, sought, strict=True):
            assert relative_error(vector.grad, gradient, floor=1e-3) < 1e-9
    name = "compute_qr" if apply_GS else "compute_factors"
    alone = [size for made, size in batches if made == name and size == 1]
    assert len(alone) >= 2, "those of the first two layers, by themselves"


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_autocast(apply_GS: bool, warm: bool) -> None:
    """Whatever the forwards before ran in, factors are made in float32."""
    model, x = adapted(apply_GS=apply_GS, dtype=F32), X.float()
    for step in range(5):
        with torch.autocast("cpu", dtype=BF16, enabled=not warm or step > 2):
            found = model(x)
        assert relative_error(found, wanted(model, X, apply_GS=apply_GS)) < 3e-2
        found.sum().backward()


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("exchanged", [False, True])
def test_another_dtype_from_here_on(apply_GS: bool, exchanged: bool) -> None:
    model = adapted(apply_GS=apply_GS, dtype=F32)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(exchanged)
    try:
        for dtype, tolerance in ((F32, 1e-5), (F64, 1e-12), (BF16, 5e-2), (F32, 1e-5)):
            model.to(dtype)
            for _ in range(3):
                found = model(X.to(dtype))
                assert relative_error(found, wanted(model, X, apply_GS=apply_GS)) < tolerance
                found.sum().backward()
            model.zero_grad()
            model.load_state_dict(model.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_what_cannot_be_made_is_left_to_its_layer() -> None:
    """Old vectors, which somebody else has emptied."""
    model = adapted()
    for _ in range(3):
        model(X)
    old = model.two.hra_u["default"]
    model.two.hra_u["default"] = nn.Parameter(normal(80, 12, 3))
    old.data = torch.empty(0, dtype=F64)
    assert relative_error(model(X), wanted(model, X)) < 1e-12


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_forward_that_is_broken_off(error: type[BaseException]) -> None:
    model = adapted()
    for _ in range(3):
        model(X)

    def stop(*_: object) -> None:
        raise error

    handle = model.two.register_forward_pre_hook(stop)
    with pytest.raises(error):
        model(X)
    handle.remove()
    assert module._CURRENT.forward is None
    model.one.hra_u["default"].data.neg_().add_(1.0)
    assert relative_error(model(X), wanted(model, X)) < 1e-12


def test_nothing_is_held_for_a_model_that_was_folded() -> None:
    model = adapted()
    for _ in range(3):
        model(X)
    vectors = weakref.ref(model.two.hra_u["default"])
    plain = hra_fx.fold(model)
    gc.collect()
    assert vectors() is None
    assert plain(X).shape == (4, 5)


def test_nothing_stays_behind_after_an_error() -> None:
    model = adapted()
    for _ in range(2):
        model(X)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(normal(1, 4, 5))
    assert module._CURRENT.forward is None
    assert relative_error(model(X), wanted(model, X)) < 1e-12


def test_no_model_is_kept_alive() -> None:
    model = adapted()
    for _ in range(3):
        model(X)
    vectors, whole = weakref.ref(model.two.hra_u["default"]), weakref.ref(model)
    del model
    gc.collect()
    assert vectors() is None
    assert whole() is None
