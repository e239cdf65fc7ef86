"""What users of PEFT do with a small model of their own, compared with the base model over dense `W Q`.

Files are compared with PEFT's in `test_files_both_ways.py`, states of several adapters in `tests/model`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from integrations.peft_parity.sides import opened_by_peft
from oracles import dense_q, dense_weight, relative_error
from torch import Tensor, nn

import hra_fx

PRECISION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(20, 2)


class Conv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 6, 3)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(6, 4, 1, bias=False)
        self.flat = nn.Flatten()
        self.lin0 = nn.Linear(16, 2)


@dataclass(frozen=True)
class Case:
    kind: type[nn.Module]
    fields: dict[str, Any]

    def base(self, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(0)
        return self.kind().to(dtype).eval()

    def x(self, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = (5, 10) if self.kind is MLP else (2, 3, 4, 4)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """An adapted model with random vectors."""
        model = hra_fx.HRAModel(self.base(dtype), hra_fx.HRAConfig(**{"r": 4, **self.fields}))
        return randomised(model, "default", 3)


LAYERS = ["lin0", "lin1"]
CASES = {
    "one layer": Case(MLP, {"target_modules": "lin0"}),
    "odd": Case(MLP, {"target_modules": LAYERS, "r": 3}),
    "GS": Case(MLP, {"target_modules": LAYERS, "apply_GS": True}),
    "GS, random": Case(MLP, {"target_modules": ["lin0"], "apply_GS": True, "init_weights": False}),
    "saved": Case(MLP, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "excluded": Case(MLP, {"target_modules": LAYERS, "exclude_modules": ["lin0"]}),
    "convolutions": Case(Conv, {"target_modules": ["conv0", "conv1"], "r": 2}),
    "convolution and linear, GS": Case(Conv, {"target_modules": ["conv0", "lin0"], "apply_GS": True, "r": 3}),
    "convolution, saved": Case(Conv, {"target_modules": ["conv0"], "modules_to_save": ["lin0"], "r": 5}),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
FIRST = CASES["one layer"]


def randomised(model: Any, adapter_name: str, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith(f".hra_u.{adapter_name}"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def dense(base: nn.Module, model: nn.Module, x: Tensor, name: str = "default") -> Tensor:
    """What the base model gives in float64 over `W Q`, with `Q` a dense product of reflections.

    Where the adapter trains a module in full, the model has the trained tensor in place of the base model's.
    """
    base = copy.deepcopy(base).double()
    state = {key: value.detach() for key, value in model.state_dict().items()}
    for path, layer in base.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        with torch.no_grad():
            for tensor, own in layer.named_parameters():
                if f"{path}.hra_saved.base_layer.{tensor}" in state:
                    own.copy_(state[f"{path}.{tensor}"])
            vectors = state.get(f"{path}.hra_u.{name}")
            if vectors is not None:
                gs = model.peft_config[name].apply_GS
                q = dense_q(vectors, apply_GS=gs, anchor=state.get(f"{path}.hra_u.{name}_anchor"))
                layer.weight.copy_(dense_weight(layer.weight, q))
    return base(x.double()).detach()


@cases
def test_forward_and_start(case: Case) -> None:
    """Random vectors rotate the weights; with `init_weights=True` the model starts as the base model."""
    for dtype, bound in PRECISION.items():
        model, x = case.model(dtype), case.x(dtype)
        output = model(x)
        assert output.dtype is dtype
        assert relative_error(output, dense(case.base(dtype), model, x)) < bound
        config = hra_fx.HRAConfig(**({"r": 4} | case.fields | {"init_weights": True}))
        assert relative_error(hra_fx.HRAModel(case.base(dtype), config)(x), case.base(dtype)(x)) < bound


@cases
def test_train_disable_merge_and_take_off(case: Case) -> None:
    model, x, base = case.model(), case.x(), case.base()
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        flag, value = before[name]
        assert (not torch.equal(parameter, value)) is (parameter.grad is not None) is flag, name
    wanted, state = dense(base, model, x), {key: value.clone() for key, value in model.state_dict().items()}
    assert relative_error(model(x), wanted) < 1e-5
    assert relative_error(model(x), base(x)) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert relative_error(model(x), wanted) < 1e-5
        # The weights before are kept, so that they come back bit for bit.
        assert [key for key in model.state_dict() if not key.endswith("hra_u.unmerged")] == list(state)
        assert any(not torch.equal(model.state_dict()[key], value) for key, value in state.items())
        model.unmerge_adapter()
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True, progressbar=False)
    model.merge_adapter()
    for plain, output in (
        (merged, wanted),
        (copy.deepcopy(model).merge_and_unload(), wanted),
        (model.unload(), base(x)),
    ):
        assert type(plain) is case.kind
        assert list(plain.state_dict()) == list(base.state_dict())
        assert relative_error(plain(x), output) < 1e-5
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.state_dict().items())


def test_a_named_adapter_is_merged_and_unloaded() -> None:
    model, x = FIRST.model(), FIRST.x()
    model.add_adapter("other", hra_fx.HRAConfig(r=3, target_modules=LAYERS))
    randomised(model, "other", 7)
    model.set_adapter("other")
    wanted = dense(FIRST.base(), model, x, "other")
    assert relative_error(model(x), wanted) < 1e-5
    with pytest.warns(hra_fx.HRAWarning, match="default"):
        plain = model.merge_and_unload(adapter_names=["other"])
    assert relative_error(plain(x), wanted) < 1e-5
    assert list(plain.state_dict()) == list(FIRST.base().state_dict())


def test_from_pretrained_uses_the_given_configuration(tmp_path: Path) -> None:
    """As in PEFT: `config=` is used instead of the folder's."""
    case = Case(MLP, {"target_modules": LAYERS, "init_weights": False})
    case.model().save_pretrained(tmp_path)
    theirs, ours = (kind.HRAConfig.from_pretrained(tmp_path) for kind in (peft, hra_fx))
    theirs.apply_GS = ours.apply_GS = True
    judge = opened_by_peft(case.base(), tmp_path, config=theirs)
    model = hra_fx.HRAModel.from_pretrained(case.base(), tmp_path, config=ours)
    assert relative_error(model(case.x()), judge(case.x())) < 1e-5


def test_a_model_made_on_meta_and_filled() -> None:
    case = Case(MLP, {"target_modules": LAYERS, "r": 4})
    model = case.model()
    empty = hra_fx.HRAModel(case.base(), hra_fx.HRAConfig(**case.fields), low_cpu_mem_usage=True)
    meta = {name for name, tensor in empty.state_dict().items() if tensor.is_meta}
    assert meta == {"lin0.hra_u.default", "lin1.hra_u.default"}
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(case.x()), model(case.x()))


def test_unknown_names_are_value_errors_as_in_peft() -> None:
    for make, config in ((hra_fx.HRAModel, hra_fx.HRAConfig), (peft.get_peft_model, peft.HRAConfig)):
        with pytest.raises(ValueError, match="absent"):
            make(FIRST.base(), config(target_modules=["absent"]))
    model = FIRST.model()
    for step in (model.delete_adapter, model.set_adapter):
        with pytest.raises(ValueError, match=r"^the model has no adapter 'absent'\. It has 'default'\.$"):
            step("absent")
    with pytest.raises(ValueError, match="exists already"):
        model.add_adapter("default", hra_fx.HRAConfig(target_modules=["lin0"]))
