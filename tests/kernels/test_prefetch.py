"""Prefetched factors: when they are computed, and that a factor of old vectors is never used."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from one_layer import BF16, F32, F64, normal
from oracles import dense_q, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hra_fx
from hra_fx.kernels import gram_schmidt, prefetch, wy_factor

Batches = list[tuple[str, int]]
X = normal(1, 4, 12)
both = pytest.mark.parametrize("apply_GS", [False, True])


class Net(nn.Module):
    """Three layers, two of one width."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12, dtype=dtype), nn.Linear(12, 7, dtype=dtype)
        self.three = nn.Linear(7, 5, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


def adapted(*, apply_GS: bool = False, r: int = 3, dtype: torch.dtype = F64, warm: int = 0, **settings: Any) -> Any:
    """The adapted net after some forwards."""
    config = hra_fx.HRAConfig(r=r, apply_GS=apply_GS, target_modules="all-linear", exclude_modules=[], **settings)
    model = hra_fx.transform(Net(dtype), config)
    for seed, layer in enumerate((model.one, model.two, model.three)):
        with torch.no_grad():
            layer.hra_u["default"].copy_(normal(seed, *layer.hra_u["default"].shape))
    for _ in range(warm):
        model(X.to(dtype))
    return model


def wanted(model: Any, x: Tensor, *, apply_GS: bool = False) -> Tensor:
    for layer in (model.one, model.two, model.three):
        box = layer.hra_u
        weight = layer.hra_base.double() @ dense_q(box["default"], apply_GS=apply_GS, anchor=box.anchor("default"))
        x = nn.functional.linear(x, weight, layer.bias.double())
        x = x if layer is model.three else torch.tanh(x)
    return x


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """The name and the batch size of each computation of factors."""
    found: Batches = []

    def count(home: Any, name: str) -> None:
        original = getattr(home, name)

        def compute(sources: Any) -> Any:
            found.append((name, len(sources)))
            return original(sources)

        monkeypatch.setattr(home, name, compute)

    count(wy_factor, "compute_factors")
    count(gram_schmidt, "compute_qr")
    return found


def test_factors_of_one_shape_are_computed_in_one_batch(batches: Batches) -> None:
    model = adapted(init_weights=False, warm=2)
    batches.clear()
    model(X)
    assert batches == [("compute_factors", 2), ("compute_factors", 1)]
    batches.clear()
    with torch.no_grad():
        model(X)
        model(X)
    assert batches == [("compute_factors", 1)] * 3


def test_gram_schmidt_too(batches: Batches) -> None:
    model = adapted(apply_GS=True, warm=2)
    batches.clear()
    assert relative_error(model(X), wanted(model, X, apply_GS=True)) < 1e-12
    assert [batch for batch in batches if batch[0] == "compute_qr"] == [("compute_qr", 2), ("compute_qr", 1)]


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize(("apply_GS", "init_weights"), [(False, False), (True, True)])
def test_the_same_bits_in_every_forward(dtype: torch.dtype, apply_GS: bool, init_weights: bool) -> None:
    model, x = adapted(apply_GS=apply_GS, init_weights=init_weights, dtype=dtype), X.to(dtype)
    runs = []
    for _ in range(3):
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        runs.append((output.detach(), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)))
    for later in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], later, strict=True))
    tolerance = {F64: 1e-12, F32: 1e-5, BF16: 5e-2}[dtype]
    assert relative_error(runs[0][0], wanted(model, x.double(), apply_GS=apply_GS)) < tolerance


@both
def test_training_follows_the_oracle(apply_GS: bool) -> None:
    """Each step changes the vectors in place."""
    model = adapted(apply_GS=apply_GS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        vectors = [layer.hra_u["default"] for layer in (model.one, model.two, model.three)]
        sought = torch.autograd.grad(wanted(model, X, apply_GS=apply_GS).square().sum(), vectors)
        loss = model(X).square().sum()
        loss.backward()
        for vector, gradient in zip(vectors, sought, strict=True):
            assert relative_error(vector.grad, gradient, floor=1e-3) < 1e-9
        optimizer.step()
        losses.append(loss.item())
    assert len(set(losses)) == 5


@both
@pytest.mark.parametrize("way", ["replaced", "in place", "data", "numpy", "new data"])
def test_vectors_that_change_during_a_forward(apply_GS: bool, way: str) -> None:
    model = adapted(apply_GS=apply_GS, warm=2)
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


@both
@pytest.mark.parametrize("away", ["no storage", "no shape", "another dtype", "other values"])
def test_vectors_that_a_tool_provides_only_while_a_layer_runs(apply_GS: bool, away: str) -> None:
    """As FSDP, DeepSpeed and layerwise casts do, without changing the version of the parameter."""
    model = adapted(apply_GS=apply_GS)
    vectors = model.two.hra_u["default"]
    values = normal(60, *vectors.shape)

    def provide(*_: object) -> None:
        version = vectors._version
        if away == "no storage":
            vectors.untyped_storage().resize_(values.numel() * 8)
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(vectors):
                vectors.copy_(values)
        else:
            vectors.data = values.clone()
        assert vectors._version == version

    def withdraw(*_: object) -> None:
        if away == "no storage":
            vectors.untyped_storage().resize_(0)
        else:
            empty = {"no shape": values[0, :0], "another dtype": values.bfloat16(), "other values": -values.flip(0)}
            vectors.data = empty[away].clone()

    withdraw()
    model.two.register_forward_pre_hook(provide)
    model.two.register_forward_hook(withdraw)
    for step in range(3):
        found = model(X)
        provide()
        assert relative_error(found, wanted(model, X, apply_GS=apply_GS)) < 1e-12
        withdraw()
        values.copy_(normal(70 + step, *values.shape))


def test_lengths_out_of_range_are_left_to_their_layer() -> None:
    model = adapted(dtype=F32, init_weights=False)
    with torch.no_grad():
        model.one.hra_u["default"].mul_(1e-25)
        model.three.hra_u["default"].mul_(1e25)
    for _ in range(3):
        assert relative_error(model(X.float()), wanted(model, X)) < 1e-5


def test_a_model_called_within_another() -> None:
    inner, outer = adapted(warm=2), adapted(warm=2)
    hidden = wanted(inner, X).sum()
    outer.two.register_forward_hook(lambda layer, args, output: output + inner(X).sum())
    for _ in range(3):
        found = outer(X)
    middle = torch.tanh(nn.functional.linear(X, outer.one.hra_base @ q_of(outer.one), outer.one.bias))
    middle = torch.tanh(nn.functional.linear(middle, outer.two.hra_base @ q_of(outer.two), outer.two.bias) + hidden)
    last = nn.functional.linear(middle, outer.three.hra_base @ q_of(outer.three), outer.three.bias)
    assert relative_error(found, last) < 1e-12


def q_of(layer: Any) -> Tensor:
    return dense_q(layer.hra_u["default"], anchor=layer.hra_u.anchor("default"))


class Checkpointed(Net):
    """Its first two layers run again in the backward, after the forward of the model."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        run = nn.Sequential(self.one, nn.Tanh(), self.two, nn.Tanh())
        return self.three(checkpoint(run, x, use_reentrant=self.reentrant))  # type: ignore[no-any-return]


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_run_again_in_the_backward(
    monkeypatch: pytest.MonkeyPatch, batches: Batches, reentrant: bool, apply_GS: bool
) -> None:
    monkeypatch.setattr(Checkpointed, "reentrant", reentrant)
    config = hra_fx.HRAConfig(r=2, apply_GS=apply_GS, target_modules="all-linear", exclude_modules=[])
    model: Any = hra_fx.transform(Checkpointed().double(), config)
    vectors = [layer.hra_u["default"] for layer in (model.one, model.two, model.three)]
    x = X.clone().requires_grad_()
    sought = torch.autograd.grad(wanted(model, x, apply_GS=apply_GS).square().sum(), vectors)
    for _ in range(3):
        model.zero_grad()
        batches.clear()
        model(x).square().sum().backward()
        for vector, gradient in zip(vectors, sought, strict=True):
            assert relative_error(vector.grad, gradient, floor=1e-3) < 1e-9
    name = "compute_qr" if apply_GS else "compute_factors"
    assert len([size for made, size in batches if made == name and size == 1]) >= 2, "the first two layers, in backward"


@both
@pytest.mark.parametrize("warm", [False, True])
def test_factors_are_float32_under_autocast(apply_GS: bool, warm: bool) -> None:
    """Whatever the forwards before ran in."""
    model, x = adapted(apply_GS=apply_GS, dtype=F32), X.float()
    for step in range(5):
        with torch.autocast("cpu", dtype=BF16, enabled=not warm or step > 2):
            found = model(x)
        assert relative_error(found, wanted(model, X, apply_GS=apply_GS)) < 3e-2
        found.sum().backward()


@both
@pytest.mark.parametrize("swapped", [False, True])
def test_another_dtype_from_now_on(apply_GS: bool, swapped: bool) -> None:
    model = adapted(apply_GS=apply_GS, dtype=F32)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swapped)
    try:
        for dtype, tolerance in ((F32, 1e-5), (F64, 1e-12), (BF16, 5e-2), (F32, 1e-5)):
            model.to(dtype)
            for _ in range(2):
                found = model(X.to(dtype))
                assert relative_error(found, wanted(model, X, apply_GS=apply_GS)) < tolerance
                found.sum().backward()
            model.zero_grad()
            model.load_state_dict(model.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_requested_vectors_that_are_empty_now_are_left_out() -> None:
    model = adapted(warm=3)
    old = model.two.hra_u["default"]
    model.two.hra_u["default"] = nn.Parameter(normal(80, 12, 3))
    old.data = torch.empty(0, dtype=F64)
    assert relative_error(model(X), wanted(model, X)) < 1e-12


def test_an_error_of_a_prefetched_computation_surfaces() -> None:
    root, vectors = nn.Identity(), nn.Parameter(torch.ones(2))
    fails = False

    def compute(sources: Sequence[tuple[Tensor, ...]]) -> list[int]:
        if fails:
            raise RuntimeError("out of memory")
        return [len(sources)]

    with prefetch.prefetching(root):
        assert prefetch.get_or_compute(compute, vectors) == 1
    fails = True
    with pytest.raises(RuntimeError, match="out of memory"), prefetch.prefetching(root):
        pass
    assert prefetch._CURRENT.forward is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_forward_that_is_interrupted(error: type[BaseException]) -> None:
    model = adapted(warm=3)

    def stop(*_: object) -> None:
        raise error

    handle = model.two.register_forward_pre_hook(stop)
    with pytest.raises(error):
        model(X)
    handle.remove()
    assert prefetch._CURRENT.forward is None
    model.one.hra_u["default"].data.neg_().add_(1.0)
    assert relative_error(model(X), wanted(model, X)) < 1e-12


@pytest.mark.parametrize("folded", [False, True])
def test_nothing_is_kept_alive(folded: bool) -> None:
    model = adapted(warm=3)
    vectors, whole = weakref.ref(model.two.hra_u["default"]), weakref.ref(model)
    if folded:
        model = hra_fx.fold(model)
    else:
        del model
    gc.collect()
    assert vectors() is None
    assert (whole() is None) is not folded
