"""A fold rests on what it was planned for, and a part of a model is folded only where nothing of it would be lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model.many import F64, adapted, assert_close, config, net, normal, oracle, run, seen, stored, turn, weights
from torch import Tensor, nn

import hra_fx
from hra_fx.model.state import record_of


class Whole(nn.Module):
    """A body that may be folded alone, and a head: `(n, 6) -> (n, 3)`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def whole(**configs: hra_fx.HRAConfig) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return adapted(Whole().to(F64).eval(), **configs)


# A part


def refused_part(model: nn.Module, listed: str, acting: str) -> None:
    before = seen(model)
    text = rf"^0: only {acting} of its adapters {listed} act .*Fold the whole model\.$"
    with pytest.raises(hra_fx.AdapterError, match=text):
        hra_fx.fold(model.body)
    with pytest.raises(hra_fx.AdapterError, match=text):
        hra_fx.plan_fold(model.body)
    assert seen(model) == before


def test_a_part_where_all_act_is_folded_with_the_same_outputs() -> None:
    plain, model = whole(a=config("0", "2"), b=config("0"))
    hra_fx.set_adapter(model, ["b", "a"])
    x = normal(3, 6)
    with pytest.raises(hra_fx.AdapterError, match=r"this part of the model has \['a', 'b'\]\. Name all of them"):
        hra_fx.fold(model.body, "a")
    wanted, new = oracle(plain, model, ["b", "a"], x), weights(plain, model, ["b", "a"])
    hra_fx.fold(model.body)
    assert_close(run(model, x), wanted)
    for name in new:
        assert_close(stored(model, name), new[name], 1e-12)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_part_with_merged_adapters_is_refused() -> None:
    plain, model = whole(a=config("0", "2"))
    x = normal(3, 6)
    hra_fx.merge_adapter(model)
    refused_part(model, r"\['a'\]", r"\[\]")
    hra_fx.unmerge_adapter(model)
    assert_close(run(model, x), oracle(plain, model, ["a"], x))
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_part_of_which_one_of_two_is_merged_is_refused() -> None:
    plain, model = whole(a=config("0", "2"), b=config("0", "2"))
    hra_fx.set_adapter(model, ["a", "b"])
    hra_fx.merge_adapter(model, "a")
    refused_part(model, r"\['a', 'b'\]", r"\['b'\]")
    x = normal(3, 6)
    assert_close(run(model, x), oracle(plain, model, ["a", "b"], x))


def test_a_part_whose_adapters_are_off_is_refused() -> None:
    plain, model = whole(a=config("0", "2"))
    x = normal(3, 6)
    with hra_fx.disable_adapters(model):
        refused_part(model, r"\['a'\]", r"\[\]")
        assert torch.equal(run(model, x), run(plain, x))
    assert_close(run(model, x), oracle(plain, model, ["a"], x))


def test_a_part_with_an_adapter_that_is_not_active_is_refused() -> None:
    plain, model = whole(a=config("0", "2"), b=config("0", "head"))
    x = normal(3, 6)
    refused_part(model, r"\['a', 'b'\]", r"\['a'\]")
    for names in (["a"], ["b"], ["b", "a"]):
        hra_fx.set_adapter(model, names)
        assert_close(run(model, x), oracle(plain, model, names, x))


def test_after_a_part_was_folded_the_rest_is_not_saved(tmp_path: Path) -> None:
    plain, model = whole(a=config("0", "2", "head"))
    x = normal(3, 6)
    wanted = oracle(plain, model, ["a"], x)
    hra_fx.fold(model.body)
    with pytest.raises(
        hra_fx.AdapterError, match=r"adapter 'a': the model changed .* body\.0 is not in step with its configuration"
    ):
        hra_fx.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert_close(run(model, x), wanted)
    hra_fx.fold(model)
    assert_close(run(model, x), wanted)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_nor_is_an_adapter_of_which_the_whole_was_folded_with_its_part(tmp_path: Path) -> None:
    _, model = whole(a=config("0", "2"))
    hra_fx.fold(model.body)
    with pytest.raises(hra_fx.AdapterError, match=r"body\.0 is not in step with its configuration"):
        hra_fx.save_adapter(model, tmp_path, "a")
    assert list(tmp_path.iterdir()) == []


def test_nor_is_an_adapter_of_a_layer_that_was_replaced(tmp_path: Path) -> None:
    _, model = whole(a=config("0", "2"), b=config("2"))
    model.body[0] = nn.Linear(6, 6, dtype=F64)
    with pytest.raises(hra_fx.AdapterError, match=r"adapter 'a': .*body\.0 is not in step with its configuration"):
        hra_fx.save_adapter(model, tmp_path / "a", "a")
    assert not (tmp_path / "a").exists()
    hra_fx.save_adapter(model, tmp_path / "b", "b")
    torch.manual_seed(0)
    other = hra_fx.load_adapter(Whole().to(F64), tmp_path / "b", "b")
    assert torch.equal(other.body[2].hra_u["b"], model.body[2].hra_u["b"])


# A plan


def step(model: nn.Module, folder: Path) -> None:
    x = normal(3, 6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()


def load(model: nn.Module, folder: Path) -> None:
    hra_fx.load_adapter(model, folder, "a")


CHANGES: dict[str, Callable[[nn.Module, Path], object]] = {
    "set another": lambda model, folder: hra_fx.set_adapter(model, "b"),
    "set both": lambda model, folder: hra_fx.set_adapter(model, ["a", "b"]),
    "set none": lambda model, folder: hra_fx.set_adapter(model, []),
    "load in place": load,
    "load a state": lambda model, folder: model.load_state_dict(model.state_dict()),
    "train": step,
    "scale": lambda model, folder: hra_fx.set_scale(model, "a", 0.5),
    "merge": lambda model, folder: hra_fx.merge_adapter(model),
    "add": lambda model, folder: hra_fx.add_adapter(model, "c", config("0")),
    "delete": lambda model, folder: hra_fx.delete_adapter(model, "b"),
    "another layer": lambda model, folder: setattr(model.body, "0", nn.Linear(6, 6, dtype=F64)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_for_what_was_is_refused(change: str, tmp_path: Path) -> None:
    _, other = whole(a=config("0", "2"))
    turn(other, seed=8)
    hra_fx.save_adapter(other, tmp_path)
    plain, model = whole(a=config("0", "2"), b=config("0", "2"))
    x = normal(3, 6)
    plan = hra_fx.plan_fold(model)
    CHANGES[change](model, tmp_path)
    before, output = seen(model), run(model, x)
    with pytest.raises(
        hra_fx.FoldError, match=r"the model changed since the fold was planned\. Call plan_fold again\.$"
    ):
        plan.apply()
    assert seen(model) == before
    assert torch.equal(run(model, x), output)
    if change in ("set another", "load in place"):
        active = record_of(model).active
        assert_close(output, oracle(plain, model, active, x))
        hra_fx.plan_fold(model, active).apply()
        assert_close(run(model, x), output)


def test_a_plan_is_not_for_the_model_while_its_adapters_are_off() -> None:
    plain, model = whole(a=config("0", "2"))
    x = normal(3, 6)
    plan = hra_fx.plan_fold(model)
    with hra_fx.disable_adapters(model), pytest.raises(hra_fx.FoldError, match="Call plan_fold again"):
        plan.apply()
    wanted = oracle(plain, model, ["a"], x)
    assert_close(run(model, x), wanted)
    plan.apply()
    assert_close(run(model, x), wanted)


def test_a_plan_is_applied_once() -> None:
    plain, model = whole(a=config("0", "2"))
    x = normal(3, 6)
    wanted = oracle(plain, model, ["a"], x)
    plan = hra_fx.plan_fold(model)
    plan.apply()
    with pytest.raises(hra_fx.FoldError, match="Call plan_fold again"):
        plan.apply()
    assert_close(run(model, x), wanted)


def test_a_plan_for_a_part_is_refused_as_well() -> None:
    plain, model = whole(a=config("0", "2"))
    x = normal(3, 6)
    plan = hra_fx.plan_fold(model.body)
    hra_fx.merge_adapter(model)
    before = seen(model)
    with pytest.raises(hra_fx.FoldError, match="Call plan_fold again"):
        plan.apply()
    assert seen(model) == before
    hra_fx.unmerge_adapter(model)
    assert_close(run(model, x), oracle(plain, model, ["a"], x))


# Set inside disable_adapters


def test_an_adapter_set_inside_over_a_merged_model_acts_afterwards() -> None:
    plain, model = adapted(net(), a=config("first", "second"), b=config("second"))
    x = normal(3, 6)
    hra_fx.merge_adapter(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with hra_fx.disable_adapters(model):
            hra_fx.set_adapter(model, "b")
            assert torch.equal(run(model, x), run(plain, x))
    record = record_of(model)
    assert (record.active, record.merged, record.disabled) == (("b",), (), False)
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ["second.hra_u.b"]
    assert_close(run(model, x), oracle(plain, model, ["b"], x))
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_so_it_does_with_copies_of_the_same_module() -> None:
    saved = {"modules_to_save": ["head"]}
    plain, model = adapted(net(), a=config("first", **saved), b=config("first", **saved))
    x = normal(3, 6)
    hra_fx.set_adapter(model, "b")
    wanted = run(model, x)
    head = {"head.weight": model.head.weight.detach(), "head.bias": model.head.bias.detach()}
    assert_close(wanted, oracle(plain, model, ["b"], x, **head))
    hra_fx.set_adapter(model, "a")
    hra_fx.merge_adapter(model)
    with hra_fx.disable_adapters(model):
        hra_fx.set_adapter(model, "b")
        assert torch.equal(run(model, x), run(plain, x))
    assert (record_of(model).active, record_of(model).merged) == (("b",), ())
    assert torch.equal(run(model, x), wanted)


@pytest.mark.parametrize("merged", [["a"], ["a", "b"]])
def test_where_none_is_set_inside_all_is_merged_as_before(merged: list[str]) -> None:
    plain, model = adapted(net(), a=config("first", "second"), b=config("second"))
    x = normal(3, 6)
    hra_fx.set_adapter(model, ["a", "b"])
    hra_fx.merge_adapter(model, merged)
    weight = stored(model, "second.weight").detach().clone()
    with hra_fx.disable_adapters(model):
        assert torch.equal(run(model, x), run(plain, x))
    assert (record_of(model).active, record_of(model).merged) == (("a", "b"), tuple(merged))
    assert torch.equal(stored(model, "second.weight"), weight)
    assert_close(run(model, x), oracle(plain, model, ["a", "b"], x))
