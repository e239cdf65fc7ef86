"""Values of folded weights, rounding, memory layout, and refusals that leave the model unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from oracles import dense_q, dense_weight, relative_error
from torch import Tensor, nn

from hra_fx import HRAConfig, fold, plan_fold, transform
from hra_fx.errors import FoldError

Layer: TypeAlias = nn.Linear | nn.Conv2d
F64 = torch.float64
LAYERS: dict[str, Callable[..., tuple[Any, tuple[int, ...]]]] = {
    "linear": lambda dtype: (nn.Linear(40, 24, dtype=dtype), (5, 40)),
    "conv": lambda dtype: (nn.Conv2d(4, 6, 3, padding=1, dtype=dtype), (2, 4, 6, 7)),
    "oblong": lambda dtype: (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), groups=2, dtype=dtype), (2, 4, 8, 9)),
    "depthwise": lambda dtype: (nn.Conv2d(4, 4, 3, groups=4, dilation=2, dtype=dtype), (2, 4, 8, 9)),
    "circular": lambda dtype: (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", dtype=dtype), (2, 4, 6, 7)),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randomize(model: nn.Module) -> None:
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if ".hra_u." in name:
            with torch.no_grad():
                parameter.copy_(normal(seed, *parameter.shape, dtype=parameter.dtype))


def adapt(model: Any, *paths: str, r: int = 3, apply_GS: bool = False, init_weights: bool = True) -> Any:
    """`model` itself, with reflections at random vectors."""
    model = transform(model, HRAConfig(r=r, apply_GS=apply_GS, init_weights=init_weights, target_modules=list(paths)))
    randomize(model)
    return model


def oracle_weight(layer: Any) -> Tensor:
    """`W Q` in float64 of an adapted layer."""
    reflection = layer.hra_u
    q = dense_q(
        reflection["default"].detach(),
        apply_GS=reflection.specs["default"].apply_GS,
        anchor=reflection.anchor("default"),
    )
    return dense_weight(layer._parameters["weight"].detach(), q)


@given(
    kind=st.sampled_from(sorted(LAYERS)),
    r=st.integers(1, 8),
    apply_GS=st.booleans(),
    init_weights=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, F64]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_weights_are_the_nearest_to_the_exact_ones(
    kind: str, r: int, apply_GS: bool, init_weights: bool, dtype: torch.dtype
) -> None:
    base, shape = LAYERS[kind](dtype)
    assume(not apply_GS or r <= base.weight[0].numel())
    bias = base.bias.detach().clone()
    model = adapt(nn.Sequential(base), "0", r=r, apply_GS=apply_GS, init_weights=init_weights)
    x = normal(50, *shape, dtype=dtype)
    wanted, weight = model(x).detach(), oracle_weight(model[0])
    fold(model)
    assert model[0] is base
    assert base.weight.dtype == dtype
    assert torch.equal(base.bias, bias)
    if dtype == F64:
        assert relative_error(model(x), wanted) < 1e-9
        assert relative_error(base.weight, weight) < 1e-12
    else:
        assert torch.equal(base.weight, weight.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_rounding_and_change(dtype: torch.dtype) -> None:
    model = adapt(nn.Sequential(nn.Linear(30, 20, dtype=dtype), nn.Linear(20, 9, dtype=dtype)), "0", "1")
    for row in plan_fold(model).layers:
        layer = model.get_submodule(row.path)
        exact, before = oracle_weight(layer), layer._parameters["weight"].detach().double()
        assert row.change == pytest.approx(relative_error(exact, before), rel=1e-9)
        expected = relative_error(exact.to(dtype), exact)
        assert row.rounding == pytest.approx(expected, rel=1e-6, abs=1e-15)
        assert (row.rounding == 0) == (dtype == F64)


def test_rounding_and_change_of_a_zero_weight_are_zero() -> None:
    """A layer that starts at zero (a zero-initialised head or projection) has nothing to round."""
    base = nn.Linear(6, 4)
    nn.init.zeros_(base.weight)
    (row,) = plan_fold(adapt(nn.Sequential(base), "0")).layers
    assert (row.rounding, row.change) == (0.0, 0.0)


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e15, 1e20])
@pytest.mark.parametrize("r", [1, 2])
def test_fold_agrees_with_the_forward_on_columns_of_extreme_size(r: int, scale: float) -> None:
    model = adapt(nn.Sequential(nn.Linear(18, 24)), "0", r=r, init_weights=False)
    with torch.no_grad():
        model[0].hra_u["default"].mul_(scale)
    x = normal(50, 4, 18, dtype=torch.float32)
    wanted, exact = model(x).detach(), x.double() @ oracle_weight(model[0]).mT + model[0].bias.double()
    assert relative_error(wanted, exact) < 1e-5
    assert relative_error(fold(model)(x), exact) < 1e-5


# Memory


def memory(tensor: Tensor) -> tuple[Any, ...]:
    return id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_parameter_and_its_memory_stay(kind: str, dtype: torch.dtype) -> None:
    base, _ = LAYERS[kind](dtype)
    before, wanted = memory(base.weight), base.weight.requires_grad
    fold(adapt(nn.Sequential(base), "0"))
    assert memory(base.weight) == before
    assert base.weight.requires_grad is wanted


def test_channels_last_weights_stay_so() -> None:
    base = nn.Conv2d(4, 6, 3, dtype=F64)
    base.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = memory(base.weight)
    model = adapt(nn.Sequential(base), "0")
    wanted = oracle_weight(base)
    fold(model)
    assert memory(base.weight) == before
    assert base.weight.is_contiguous(memory_format=torch.channels_last)
    assert not base.weight.is_contiguous()
    assert relative_error(base.weight, wanted) < 1e-12


def test_a_transposed_weight_keeps_its_strides() -> None:
    base = nn.Linear(6, 4, dtype=F64)
    base.weight = nn.Parameter(normal(1, 6, 4).mT)
    before = memory(base.weight)
    model = adapt(nn.Sequential(base), "0")
    wanted = oracle_weight(base)
    fold(model)
    assert memory(base.weight) == before
    assert relative_error(base.weight, wanted) < 1e-12


def test_two_halves_of_one_buffer_are_not_tied() -> None:
    """As flat-parameter optimisers lay them out: the same storage, and no element in common."""
    flat = normal(1, 48)
    model: Any = nn.Sequential(nn.Linear(6, 4, dtype=F64), nn.Linear(4, 6, dtype=F64))
    model[0].weight, model[1].weight = (nn.Parameter(flat[:24].view(4, 6)), nn.Parameter(flat[24:].view(6, 4)))
    model = adapt(model, "0", "1")
    wanted = [oracle_weight(layer) for layer in model]
    fold(model)
    for layer, weight in zip(model, wanted, strict=True):
        assert relative_error(layer.weight, weight) < 1e-12


def test_a_shared_layer_is_folded_once() -> None:
    shared = nn.Linear(6, 6, dtype=F64)
    model = adapt(nn.Sequential(shared, nn.ReLU(), shared), "0", "2")
    wanted, x = oracle_weight(shared), normal(1, 3, 6)
    output = model(x).detach()
    plan = plan_fold(model)
    assert [row.path for row in plan.layers] == ["0"]
    plan.apply()
    assert relative_error(shared.weight, wanted) < 1e-12
    assert relative_error(model(x), output) < 1e-9


def test_what_is_not_adapted_is_not_touched() -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)), "2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("2.")}
    fold(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_fold_in_any_gradient_mode(guard: Any) -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 4, dtype=F64)), "0")
    wanted = oracle_weight(model[0])
    with guard():
        fold(model)
    assert relative_error(model[0].weight, wanted) < 1e-12
    assert model[0].weight.requires_grad
    assert model[0].weight.grad_fn is None


def test_fold_under_autocast_is_exact() -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 4, dtype=F64)), "0")
    wanted = oracle_weight(model[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fold(model)
    assert relative_error(model[0].weight, wanted) < 1e-12


# Plans


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def untouched(model: nn.Module, before: dict[str, Tensor], x: Tensor, output: Tensor) -> bool:
    """The same keys, values (NaN included), classes and outputs as before."""
    after = model.state_dict()
    same = after.keys() == before.keys() and all(
        torch.equal(after[name].nan_to_num(7.0), before[name].nan_to_num(7.0)) for name in before
    )
    return same and torch.equal(model(x).nan_to_num(7.0), output.nan_to_num(7.0))


def test_a_plan_changes_nothing() -> None:
    model, x = adapt(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4)), "0", "2"), torch.randn(3, 6)
    before, output = snapshot(model), model(x)
    versions = [parameter._version for parameter in model.parameters()]
    plan_fold(model)
    assert untouched(model, before, x, output)
    assert [parameter._version for parameter in model.parameters()] == versions


def successor(tensor: Tensor) -> nn.Parameter:
    """Another parameter of that shape, which was written to as many times."""
    made = nn.Parameter(torch.randn_like(tensor))
    while made._version < tensor._version:
        made.mul_(1.0)
    return made


@pytest.mark.parametrize("what", ["vectors", "weight", "vectors replaced", "weight replaced", "state assigned", "step"])
def test_a_plan_does_not_outlive_a_change(what: str) -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 4)), "0")
    plan, layer = plan_fold(model), model[0]
    with torch.no_grad():
        if what == "vectors":
            layer.hra_u["default"].mul_(1.5).add_(0.1)
        elif what == "weight":
            layer._parameters["weight"].add_(1.0)
        elif what == "vectors replaced":
            layer.hra_u["default"] = successor(layer.hra_u["default"])
        elif what == "weight replaced":
            layer.weight = successor(layer._parameters["weight"])
        elif what == "step":
            layer.hra_u["default"].grad = torch.ones(6, 3)
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        else:
            state = {name: successor(tensor) for name, tensor in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
    before, x = snapshot(model), torch.randn(3, 6)
    output = model(x)
    with pytest.raises(FoldError, match="changed since"):
        plan.apply()
    assert untouched(model, before, x, output)


# Refusals


def refused(model: nn.Module, x: Tensor, *words: str) -> None:
    before, output = snapshot(model), model(x).detach()
    with pytest.raises(FoldError) as caught:
        fold(model)
    for word in words:
        assert word in str(caught.value)
    assert untouched(model, before, x, output)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("apply_GS", [False, True])
def test_vectors_that_are_not_finite(value: float, apply_GS: bool) -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), "0", "2", apply_GS=apply_GS)
    with torch.no_grad():
        model[2].hra_u["default"][1, 1] = value
    refused(model, torch.randn(3, 6), "2")


def test_a_weight_that_is_not_finite() -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), "0", "2")
    with torch.no_grad():
        model[2]._parameters["weight"][0, 0] = float("nan")
    refused(model, torch.randn(3, 6), "2", "not finite")


def test_a_float16_weight_that_overflows() -> None:
    base = nn.Linear(4, 1, dtype=torch.float16)
    with torch.no_grad():
        base.weight.fill_(65000.0)
    model = adapt(nn.Sequential(base), "0", r=1, init_weights=False)
    with torch.no_grad():
        # Turns (1, 1, 1, 1) onto one axis, twice as long.
        model[0].hra_u["default"].copy_(torch.tensor([[-1.0], [1.0], [1.0], [1.0]]))
    refused(model, torch.zeros(1, 4, dtype=torch.float16), "0", "not finite")


def test_dependent_vectors_with_gram_schmidt() -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), "0", "1", apply_GS=True)
    with torch.no_grad():
        model[1].hra_u["default"][:, 2] = model[1].hra_u["default"][:, 0]
    refused(model, torch.randn(3, 6), "1", "dependent")


def test_pefts_paired_start_with_gram_schmidt() -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 6)), "0", r=4, apply_GS=True)
    with torch.no_grad():
        half = torch.randn(6, 2)
        model[0].hra_u["default"].copy_(half.repeat_interleave(2, dim=1))
    refused(model, torch.randn(3, 6), "0", "dependent")


def test_a_deep_copy_is_folded_alone() -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 4, dtype=F64)), "0")
    other, before, x = copy.deepcopy(model), snapshot(model), normal(1, 3, 6)
    output = model(x)
    fold(other)
    assert untouched(model, before, x, output)
    assert relative_error(other(x), output) < 1e-9
