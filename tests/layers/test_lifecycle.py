"""Sites of every kind through all that a model goes through: files, copies, merges, other adapters, narrow dtypes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapting import config
from layers.checking import assert_same, dense_weights, normal, pair, randomise, run_dense, vectors_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hra_fx


class Reading(nn.Module):
    """A Linear read by hand, beside one that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.after = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(F.linear(x, self.fc.weight, self.fc.bias)))


class Untraced(Reading):
    def forward(self, x: Tensor) -> Tensor:
        x = x if float(x.detach().sum()) < 1e9 else -x
        return self.after(torch.tanh(F.linear(x, self.fc.weight, self.fc.bias)))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.after = nn.MultiheadAttention(6, 2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.attn(x, x, x, need_weights=False)[0])


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


class Calling(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc, self.after = layer, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.fc(x)))


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    x: Tensor

    def pair(self, **kwargs: Any) -> tuple[Any, Any]:
        return pair(self.make, self.targets, **kwargs)


CASES = {
    "read": Case(Reading, ("fc", "after"), normal(1, 3, 6)),
    "read, untraced": Case(Untraced, ("fc", "after"), normal(1, 3, 6)),
    "attention": Case(Attending, ("attn", "out_proj", "after"), normal(1, 5, 2, 6)),
    "own forward": Case(lambda: Calling(Doubling(6, 6)), ("fc", "after"), normal(1, 3, 6)),
    "Conv1D": Case(lambda: Calling(Conv1D(6, 6)), ("fc", "after"), normal(1, 3, 6)),
    "Conv1d": Case(lambda: Calling(nn.Conv1d(4, 5, 3, padding="same")), ("fc", "after"), normal(1, 2, 4, 6)),
    "Conv3d": Case(lambda: Calling(nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 0, 1))), ("fc",), normal(1, 2, 2, 3, 4, 6)),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
sorts = pytest.mark.parametrize("fields", [{"r": 2}, {"r": 3}, {"r": 2, "apply_GS": True}], ids=["even", "odd", "GS"])


def other_start(case: Case, **fields: Any) -> nn.Module:
    """The same base model, transformed again."""
    torch.manual_seed(0)
    base = case.make().double().eval()
    return hra_fx.transform(base, config(*case.targets, **fields))


@every
@sorts
def test_the_start_is_the_base_model(case: Case, fields: dict[str, Any]) -> None:
    base, _ = case.pair(**fields)
    assert_same(other_start(case, **fields)(case.x), base(case.x), rtol=1e-12)


@every
@sorts
def test_state_dict(case: Case, fields: dict[str, Any]) -> None:
    base, model = case.pair(**fields)
    state = model.state_dict()
    mine = {key for key in state if ".hra_u." in key}
    assert [key for key in state if key not in mine] == list(base.state_dict())
    for key, value in base.state_dict().items():
        assert torch.equal(state[key], value), key
    paths = set(vectors_of(model))
    anchored = fields != {"r": 2}
    assert mine == {f"{path}.hra_u.{name}" for path in paths for name in ("default", "default_anchor")[: 1 + anchored]}
    other = other_start(case, **fields)
    other.load_state_dict(state)
    assert_same(other(case.x), run_dense(base, model, case.x))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(names) == sorted(f"{path}.hra_u.default" for path in paths)
    assert set(dict(base.named_parameters())) <= set(dict(model.named_parameters()))


@every
def test_deepcopy_and_torch_save(case: Case) -> None:
    base, model = case.pair()
    wanted = run_dense(base, model, case.x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_same(twin(case.x), wanted)
        assert list(twin.state_dict()) == list(model.state_dict())
        randomise(twin, seed=9)
        assert_same(twin(case.x), run_dense(base, twin, case.x))
        assert_same(model(case.x), wanted)
        for name, part in twin.named_modules():
            assert type(part) is type(model.get_submodule(name))
        folded = hra_fx.fold(twin)
        assert [type(part) for part in folded.modules()] == [type(part) for part in base.modules()]


@every
@sorts
def test_adapter_files(case: Case, fields: dict[str, Any], tmp_path: Path) -> None:
    base, model = case.pair(**fields)
    wanted = run_dense(base, model, case.x).detach()
    hra_fx.save_adapter(model, tmp_path)
    loaded = hra_fx.load_adapter(copy.deepcopy(base), tmp_path)
    assert_same(loaded(case.x), wanted, rtol=1e-6)
    for path, vectors in vectors_of(loaded).items():
        assert vectors.dtype == vectors_of(model)[path].dtype


@every
def test_low_memory_and_load(case: Case, tmp_path: Path) -> None:
    base, model = case.pair(r=2)
    hra_fx.save_adapter(model, tmp_path)
    settings = config(*case.targets, r=2)
    empty = hra_fx.transform(copy.deepcopy(base), settings, low_cpu_mem_usage=True)
    assert all(vectors.is_meta for vectors in vectors_of(empty).values())
    with pytest.raises((hra_fx.AdapterError, RuntimeError), match="meta device"):
        empty(case.x)
    filled = hra_fx.load_adapter(empty, tmp_path)
    assert_same(filled(case.x), run_dense(base, model, case.x), rtol=1e-6)
    assigned = hra_fx.transform(copy.deepcopy(base), settings, low_cpu_mem_usage=True)
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert_same(assigned(case.x), run_dense(base, model, case.x))


@every
@sorts
def test_merge_and_unmerge(case: Case, fields: dict[str, Any]) -> None:
    base, model = case.pair(**fields)
    wanted = run_dense(base, model, case.x).detach()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hra_fx.merge_adapter(model)
    assert_same(model(case.x), wanted)
    for name, weight in dense_weights(base, model).items():
        assert_same(model.state_dict()[name], weight.detach())
    hra_fx.unmerge_adapter(model)
    assert_same(model(case.x), wanted)
    assert dict.fromkeys(before, True) == {
        name: torch.equal(value, before[name]) for name, value in model.state_dict().items()
    }


@every
def test_disabling(case: Case) -> None:
    base, model = case.pair()
    wanted = run_dense(base, model, case.x)
    with hra_fx.disable_adapters(model):
        assert_same(model(case.x), base(case.x), rtol=1e-14)
    assert_same(model(case.x), wanted)


@every
def test_two_adapters_and_deleting_one(case: Case) -> None:
    base, model = case.pair()
    hra_fx.add_adapter(model, "other", config(*case.targets, r=2, apply_GS=True))
    with torch.no_grad():
        for vectors in vectors_of(model, "other").values():
            vectors.copy_(normal(8, *vectors.shape))
    assert_same(model(case.x), run_dense(base, model, case.x))
    hra_fx.set_adapter(model, ["default", "other"])
    output = model(case.x)
    wanted = run_dense(base, model, case.x, adapters=("default", "other"))
    assert_same(output, wanted)
    leaves = [*vectors_of(model).values(), *vectors_of(model, "other").values()]
    for mine, oracle in zip(
        torch.autograd.grad(output.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
    ):
        assert_same(mine, oracle, rtol=1e-8)
    hra_fx.set_adapter(model, ["other", "default"])
    assert_same(model(case.x), run_dense(base, model, case.x, adapters=("other", "default")))
    hra_fx.set_adapter(model, "other")
    assert_same(model(case.x), run_dense(base, model, case.x, adapters=("other",)))
    hra_fx.delete_adapter(model, "default")
    assert_same(model(case.x), run_dense(base, model, case.x, adapters=("other",)))
    assert not vectors_of(model)


@every
def test_strength(case: Case) -> None:
    base, model = case.pair(r=2)
    full = run_dense(base, model, case.x).detach()
    hra_fx.set_scale(model, "default", 0.0)
    assert_same(model(case.x), base(case.x))
    hra_fx.set_scale(model, "default", 0.5)
    half = model(case.x).detach()
    twice = copy.deepcopy(model)
    # Half of it, folded, and half again is the whole: W Q^(1/2) Q^(1/2).
    hra_fx.fold(twice)
    again = hra_fx.transform(twice, config(*case.targets, r=2))
    again.load_state_dict({k: v for k, v in model.state_dict().items() if ".hra_u." in k}, strict=False)
    assert float((half - full).abs().max()) > 1e-6
    hra_fx.set_scale(again, "default", 0.5)
    assert_same(again(case.x), full, rtol=1e-9)
    hra_fx.set_scale(model, "default", 1.0)
    assert_same(model(case.x), full)


@every
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
@pytest.mark.parametrize("again", [False, True])
def test_fold_and_transform_again(case: Case, again: bool) -> None:
    base, model = case.pair()
    wanted = run_dense(base, model, case.x).detach()
    folded = hra_fx.fold(model)
    assert_same(folded(case.x), wanted)
    assert list(folded.state_dict()) == list(base.state_dict())
    if again:
        before = copy.deepcopy(folded)
        hra_fx.transform(folded, config(*case.targets))
        randomise(folded, seed=4)
        assert_same(folded(case.x), run_dense(before, folded, case.x))


@every
def test_training_moves_the_vectors_alone(case: Case) -> None:
    base, model = case.pair(r=2)
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if ".hra_u." not in name}
    losses = []
    for _ in range(15):
        loss = (model(case.x) - 0.3).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items() if name in frozen)
    assert_same(model.eval()(case.x), run_dense(base, model, case.x))
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".hra_u." not in name)


@every
def test_data_parallel_replicas_and_functional_calls(case: Case) -> None:
    """A copy whose tensors are replaced, as `functional_call` does, rotates what it is given."""
    base, model = case.pair()
    state = {name: value.detach() for name, value in model.named_parameters()}
    moved = {name: value * 1.5 if name.endswith("weight") else value for name, value in state.items()}
    got = torch.func.functional_call(model, moved, (case.x,), tie_weights=False)
    scaled = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            parameter.copy_(moved[name])
    assert_same(got, run_dense(scaled, model, case.x))
