"""A plan is applied to an unchanged model only, and a model whose parts were replaced is not saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model.many import F64, adapted, assert_close, config, normal, oracle, refuses, run, seen, turn
from torch import Tensor, nn

import hra_fx


class Whole(nn.Module):
    """A body and a head: `(n, 6) -> (n, 3)`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def whole(**configs: hra_fx.HRAConfig) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return adapted(Whole().to(F64).eval(), **configs)


def test_a_part_of_a_transformed_model_is_not_folded_alone() -> None:
    _, model = whole(a=config("0", "2"))
    for fold in (hra_fx.fold, hra_fx.plan_fold):
        with refuses(model, r"^Sequential is a submodule of a transformed model\. Pass the model that was transformed"):
            fold(model.body)


NOT_MATCHING = (
    r"^adapter 'a': body\.0 does not match the adapter's configuration, because a part of the model was folded or "
    r"replaced after transform\. The saved file could not be loaded\. Fold the whole model instead\.$"
)


def test_an_adapter_of_a_layer_that_was_replaced_cannot_be_saved(tmp_path: Path) -> None:
    _, model = whole(a=config("0", "2"), b=config("2"))
    model.body[0] = nn.Linear(6, 6, dtype=F64)
    with pytest.raises(hra_fx.AdapterError, match=NOT_MATCHING):
        hra_fx.save_adapter(model, tmp_path / "a", "a")
    assert not (tmp_path / "a").exists()
    hra_fx.save_adapter(model, tmp_path / "b", "b")
    torch.manual_seed(0)
    other = hra_fx.load_adapter(Whole().to(F64), tmp_path / "b", "b")
    assert torch.equal(other.body[2].hra_u["b"], model.body[2].hra_u["b"])


# A plan


def step(model: nn.Module, folder: Path) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(normal(3, 6)).square().sum().backward()
    optimizer.step()


def load(model: nn.Module, folder: Path) -> None:
    hra_fx.load_adapter(model, folder, "a")


def successor(tensor: Tensor) -> nn.Parameter:
    """Another parameter of that shape, which was written to as many times."""
    made = nn.Parameter(torch.randn_like(tensor))
    while made._version < tensor._version:
        made.mul_(1.0)
    return made


def assign(model: nn.Module, folder: Path) -> None:
    state = {name: successor(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


CHANGES: dict[str, Callable[[Any, Path], object]] = {
    "set another": lambda model, folder: hra_fx.set_adapter(model, "b"),
    "load in place": load,
    "load a state": lambda model, folder: model.load_state_dict(model.state_dict()),
    "assign a state": assign,
    "train": step,
    "scale": lambda model, folder: hra_fx.set_scale(model, "a", 0.5),
    "merge": lambda model, folder: hra_fx.merge_adapter(model),
    "delete": lambda model, folder: hra_fx.delete_adapter(model, "b"),
    "another layer": lambda model, folder: setattr(model.body, "0", nn.Linear(6, 6, dtype=F64)),
    "apply": lambda model, folder: hra_fx.plan_fold(model, "a").apply(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_cannot_be_applied_after_a_change(change: str, tmp_path: Path) -> None:
    _, other = whole(a=config("0", "2"))
    turn(other, seed=8)
    hra_fx.save_adapter(other, tmp_path)
    plain, model = whole(a=config("0", "2"), b=config("0", "2"))
    x, before = normal(3, 6), seen(model)
    plan = hra_fx.plan_fold(model)
    assert seen(model) == before
    with torch.set_grad_enabled(change == "train"):
        CHANGES[change](model, tmp_path)
    output = run(model, x)
    with refuses(model, r"the model has changed since plan_fold\. Call plan_fold again\.$", hra_fx.FoldError):
        plan.apply()
    assert torch.equal(run(model, x), output)
    if change == "load in place":
        assert_close(output, oracle(plain, model, ["a"], x))


def test_a_plan_is_applied_once_and_not_while_adapters_are_disabled() -> None:
    plain, model = whole(a=config("0", "2"))
    x = normal(3, 6)
    wanted = oracle(plain, model, ["a"], x)
    plan = hra_fx.plan_fold(model)
    with hra_fx.disable_adapters(model), pytest.raises(hra_fx.FoldError, match="Call plan_fold again"):
        plan.apply()
    assert_close(run(model, x), wanted)
    plan.apply()
    with pytest.raises(hra_fx.FoldError, match="Call plan_fold again"):
        plan.apply()
    assert_close(run(model, x), wanted)
