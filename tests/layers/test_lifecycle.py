"""Every kind of adapted layer: files, copies, merges, several adapters, scales, narrow dtypes."""

from __future__ import annotations

import copy
import io
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import randomise
from layers.cases import CASES, SHARED, Case, marked
from layers.checking import assert_same, dense_weights, gradients, normal, run_dense, vectors_of
from layers.reading_weights import assert_gradients
from oracles import relative_error
from peft_sides import by_peft, by_us, opened_by_peft, plain_name, randomise as randomise_trained, same_tensors
from safetensors.torch import load_file
from torch import Tensor, nn

import hra_fx

every = pytest.mark.parametrize("case", [*map(marked, CASES)])
SORTS: list[dict[str, Any]] = [{"r": 2}, {"r": 3}, {"r": 2, "apply_GS": True}]
sorts = pytest.mark.parametrize(("case", "fields"), [*map(marked, CASES, cycle(SORTS))])


def other_start(case: Case, **fields: Any) -> nn.Module:
    """The same base model, transformed again, which keeps its modules and parameters."""
    torch.manual_seed(0)
    base = case.make().double().eval()
    before = [*base.modules(), *base.parameters()]
    model = hra_fx.transform(base, case.config(**fields))
    assert model is base and {*map(id, before)} <= {*map(id, [*base.modules(), *base.parameters()])}
    return model


def two(case: Case) -> tuple[Any, Any]:
    """A base model, and an adapted copy with a second adapter "other" that is not active."""
    base, model = case.pair()
    hra_fx.add_adapter(model, "other", case.config(*case.others, r=2, apply_GS=True))
    with torch.no_grad():
        for vectors in vectors_of(model, "other").values():
            vectors.copy_(normal(8, *vectors.shape))
    return base, model


@every
def test_the_start_is_the_base_model(case: Case) -> None:
    base, _ = case.pair()
    assert_same(case.run(other_start(case, r=2)), case.run(base), rtol=1e-11)


@sorts
def test_state_dict(case: Case, fields: dict[str, Any]) -> None:
    base, model = case.pair(**fields)
    state = model.state_dict()
    mine = {key for key in state if ".hra_u." in key}
    assert [key for key in state if key not in mine] == list(base.state_dict())
    for key, value in base.state_dict().items():
        assert torch.equal(state[key], value), key
    every_path = {path for path, part in model.named_modules(remove_duplicate=False) if hasattr(part, "hra_u")}
    assert mine == {f"{path}.hra_u.default" for path in every_path}
    other = other_start(case, **fields)
    other.load_state_dict(state)
    assert_same(case.run(other), case.dense(base, model))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted(f"{path}.hra_u.default" for path in vectors_of(model))
    assert set(dict(base.named_parameters())) <= set(dict(model.named_parameters()))


@every
def test_deepcopy_and_torch_save(case: Case) -> None:
    base, model = case.pair()
    wanted = case.dense(base, model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_same(case.run(twin), wanted)
        assert list(twin.state_dict()) == list(model.state_dict())
        assert len(list(twin.parameters())) == len(list(model.parameters()))
        randomise(twin, seed=9)
        assert_same(case.run(twin), case.dense(base, twin))
        assert_same(case.run(model), wanted)
        for name, part in twin.named_modules():
            assert type(part) is type(model.get_submodule(name))
        folded = hra_fx.fold(twin)
        assert [type(part) for part in folded.modules()] == [type(part) for part in base.modules()]


@sorts
def test_files_and_states_are_loaded_with_and_without_memory(
    case: Case, fields: dict[str, Any], tmp_path: Path
) -> None:
    base, model = case.pair(**fields)
    wanted = case.dense(base, model)
    hra_fx.save_adapter(model, tmp_path)
    empty = hra_fx.transform(copy.deepcopy(base), case.config(**fields), low_cpu_mem_usage=True)
    assert all(vectors.is_meta for vectors in vectors_of(empty).values())
    assigned = copy.deepcopy(empty)
    with pytest.raises((hra_fx.AdapterError, RuntimeError), match="meta device"):
        case.run(empty)
    for loaded in (hra_fx.load_adapter(copy.deepcopy(base), tmp_path), hra_fx.load_adapter(empty, tmp_path)):
        assert_same(case.run(loaded), wanted, rtol=1e-6)
        for path, vectors in vectors_of(loaded).items():
            assert vectors.dtype == vectors_of(model)[path].dtype
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert_same(case.run(assigned), wanted)


@sorts
def test_effective_weights_are_dense_products(case: Case, fields: dict[str, Any]) -> None:
    base, model = case.pair(**fields)
    for name, wanted in dense_weights(base, model).items():
        path, _, last = name.rpartition(".")
        is_experts = bool(case.parameters)
        layer: Any = model.get_submodule(f"{path}.hra_{last}" if is_experts else path)
        effective, weight = hra_fx.effective_weight(layer), layer.hra_base
        assert type(effective) is Tensor and torch.equal(weight, base.get_parameter(name))
        assert is_experts or model.get_parameter(name) is weight
        assert_gradients(effective * 2, wanted * 2, [layer.hra_u["default"]])


@every
def test_two_adapters_are_applied_in_order_merged_folded_and_deleted(case: Case) -> None:
    """`test_any_order.py` does the same steps in any order, for Linear layers."""
    (base, model), names = two(case), ["default", "other"]
    assert not any(vectors.requires_grad for vectors in vectors_of(model, "other").values())
    for order in ([], ["other", "default"], names):
        hra_fx.set_adapter(model, order)
        wanted = case.dense(base, model, *order) if order else case.run(base)
        assert_same(case.run(model), wanted, rtol=1e-10 if order else 1e-14)
    vectors = [*vectors_of(model).values(), *vectors_of(model, "other").values()]
    for mine, oracle in zip(*(gradients(output, vectors) for output in (case.run(model), wanted)), strict=True):
        assert_same(mine, oracle, rtol=1e-8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hra_fx.merge_adapter(model)
    assert_same(case.run(model), wanted)
    for name, weight in dense_weights(base, model, names).items():
        assert_same(model.state_dict()[name], weight.detach())
    hra_fx.unmerge_adapter(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_same(case.run(hra_fx.fold(copy.deepcopy(model))), wanted)
    alone = other_start(case)
    hra_fx.delete_adapter(model, "other")
    assert list(model.state_dict()) == list(alone.state_dict())
    assert [type(part) for part in model.modules()] == [type(part) for part in alone.modules()]
    assert_same(case.run(model), case.dense(base, model))
    hra_fx.delete_adapter(model, "default")
    assert list(model.state_dict()) == list(base.state_dict())
    assert_same(case.run(model), case.run(base), rtol=1e-14)


@every
def test_scale(case: Case, tmp_path: Path) -> None:
    base, model = case.pair(r=4)
    full = case.dense(base, model)
    hra_fx.set_scale(model, "default", 0.0)
    assert_same(case.run(model), case.run(base))
    hra_fx.set_scale(model, "default", 0.5)
    # Two adapters at scale 0.5, one of them folded: W Q^(1/2) Q^(1/2) = W Q.
    again = hra_fx.transform(hra_fx.fold(copy.deepcopy(model)), case.config(r=4))
    again.load_state_dict({k: v for k, v in model.state_dict().items() if ".hra_u." in k}, strict=False)
    with pytest.raises(AssertionError):
        assert_same(case.run(model), full, rtol=1e-5)
    hra_fx.set_scale(again, "default", 0.5)
    assert_same(case.run(again), full, rtol=1e-8)
    hra_fx.save_adapter(model, tmp_path)
    assert_same(case.run(hra_fx.load_adapter(copy.deepcopy(base), tmp_path)), case.run(model))
    hra_fx.set_scale(model, "default", 1.0)
    assert_same(case.run(model), full)


@pytest.mark.parametrize("case", [marked(name) for name, case in CASES.items() if isinstance(case.x, Tensor)])
def test_bfloat16_and_autocast(case: Case) -> None:
    base, model = case.pair(dtype=torch.bfloat16, r=4)
    assert all(vectors.dtype == torch.float32 for vectors in vectors_of(model).values())
    wide = copy.deepcopy(base).double()
    wanted = torch.func.functional_call(
        wide, dense_weights(base, model), (case.x.to(torch.bfloat16).double(),), tie_weights=False
    )
    got = model(case.x.to(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    assert_same(got, wanted, rtol=0.03)
    grads = torch.autograd.grad(got.float().sum(), list(vectors_of(model).values()))
    exact = torch.autograd.grad(wanted.sum(), list(vectors_of(model).values()))
    for mine, oracle in zip(grads, exact, strict=True):
        assert mine.dtype == torch.float32 and bool(mine.isfinite().all())
        assert_same(mine, oracle, rtol=0.1)
    base32, model32 = case.pair(dtype=torch.float32, r=4)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model32(case.x.float())
    assert_same(narrow, run_dense(base32.double(), model32, case.x).detach(), rtol=0.03)


@every
def test_functional_calls(case: Case) -> None:
    """`functional_call` replaces the weights, and the replacements are rotated."""
    base, model = case.pair()
    state = {name: value.detach() for name, value in model.named_parameters()}
    moved = {name: value * 1.5 if name.endswith("weight") else value for name, value in state.items()}
    args, kwargs = case.call
    got = torch.func.functional_call(model, moved, args, kwargs, tie_weights=False)
    scaled = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            parameter.copy_(moved[name])
    assert_same(got, case.dense(scaled, model))


# ---- layers with several paths ----

cases = pytest.mark.parametrize("name", SHARED)


@pytest.mark.needs("peft>=0.21")
@cases
def test_each_layer_has_one_container_and_its_file_goes_through_peft(name: str, tmp_path: Path) -> None:
    def base() -> nn.Module:
        return SHARED[name].pair()[0]

    def run(model: nn.Module) -> Tensor:
        output = SHARED[name].run(model)
        return getattr(output, "logits", output)

    fields = {"r": 4, "target_modules": list(SHARED[name].targets), "init_weights": False}
    ours, theirs = by_us(base(), **fields).eval(), by_peft(base(), **fields).eval()
    trained = {plain_name(key) for key, value in theirs.named_parameters() if value.requires_grad}
    assert {plain_name(key) for key, value in ours.named_parameters() if value.requires_grad} == trained
    assert [row.path for row in hra_fx.report(ours).rows] == list(SHARED[name].sites)
    randomise_trained(ours)
    ours.save_pretrained(tmp_path / "ours")
    kept = [key for key in load_file(tmp_path / "ours" / "adapter_model.safetensors") if key.endswith(".hra_u")]
    assert sorted(kept) == sorted(f"base_model.model.{path}.hra_u" for path in SHARED[name].sites)
    opened_by_peft(base(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    same_tensors(tmp_path / "ours", tmp_path / "theirs")
    again = hra_fx.load_adapter(base(), tmp_path / "theirs")
    assert relative_error(run(again), run(ours)) < 1e-6
