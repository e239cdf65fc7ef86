"""Code that reads `layer.weight`, moves it and stores it as the parameter moves `W`; any other copy of it is `W Q`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import moe_models
import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from hypothesis import given, settings, strategies as st
from layers.checking import assert_same, run_dense
from layers.reading_weights import X, dense, functional, layer_pair
from torch import Tensor, nn

import hra_fx

F64 = torch.float64

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


def stored(moved: Tensor, *, trained: bool = False) -> nn.Parameter:
    return nn.Parameter(moved, requires_grad=trained)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(sorted(MOVES)), min_size=1, max_size=4), st.booleans(), st.booleans())
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
                    stored(weight)
                continue
            layer._parameters["weight"] = stored(weight, trained=trained)
        parameter = dict(model.named_parameters())[f"{path}.weight"]
        assert type(parameter) is nn.Parameter and parameter.requires_grad is trained
        assert torch.equal(parameter, base.get_submodule(path).weight)
    wanted = run_dense(base, model, X).detach()
    assert_same(model(X), wanted)
    assert_same(hra_fx.fold(model)(X), wanted)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_moved_weight_of_experts_is_the_base_weight_too(name: str, grad: bool) -> None:
    model = hra_fx.transform(moe_models.built(name, implementation="eager"), moe_models.experts_config())
    moe_models.randomise(model)
    call = moe_models.call_of(name)
    wanted, before = model(**call).logits, copy.deepcopy(model.state_dict())
    with torch.set_grad_enabled(grad):
        for module in list(model.modules()):
            if hasattr(module, "hra_down_proj"):
                module._parameters["down_proj"] = stored(module.down_proj.cpu().clone())
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert_same(model(**call).logits, wanted)


def test_accelerate_moves_the_base_weight_to_the_meta_device_and_back() -> None:
    base, model = functional()
    wanted = run_dense(base, model, X)
    set_module_tensor_to_device(model, "read.weight", "meta")
    assert model.read.weight.is_meta and model.read.hra_base.is_meta
    set_module_tensor_to_device(model, "read.weight", "cpu", value=base.read.weight)
    assert_same(model(X), wanted)


def test_a_tied_weight_that_is_moved_by_its_adapted_layer_stays_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.embed = nn.Linear(6, 6, bias=False), nn.Embedding(6, 6)
            self.embed.weight = self.head.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    base = Tied()
    model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=2, target_modules=["head"], init_weights=False))
    wanted = model(torch.arange(6))
    again = stored(model.head.weight.to("cpu", copy=True))
    model.embed._parameters["weight"] = model.head._parameters["weight"] = again
    with hra_fx.disable_adapters(model):  # nothing reads the head before the embedding
        assert_same(model(torch.arange(6)), base(torch.arange(6)))
    moved = stored(model.head.weight.to("cpu", copy=True))
    model.embed._parameters["weight"] = model.head._parameters["weight"] = moved
    for module in (model.head, model.embed):  # as accelerate ties weights
        module.weight = model.head.weight
    assert model.embed.weight is model.head.hra_base
    assert_same(model(torch.arange(6)), wanted)


# ---- anywhere else ----


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
