"""Weights that share memory: a fold gives the layer its own and leaves the others alone, bit for bit."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from oracles import dense_q, dense_weight, relative_error
from torch import Tensor, nn

import hra_fx
from hra_fx.model.state import sites_of

F64 = torch.float64


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))  # type: ignore[no-any-return]


TOKENS = torch.arange(9)


def adapted(model: nn.Module, *paths: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    model.to(F64)
    hra_fx.transform(model, hra_fx.HRAConfig(**{"r": 3, "target_modules": list(paths), **fields}))
    turn(model)
    return model


def turn(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in sites_of(model).values():
            for vectors in layer.hra_u.values():
                vectors.normal_()


def oracle(layer: Any, *names: str) -> Tensor:
    """`W Q_a Q_b ...` of a layer, by the dense product."""
    weight = layer._parameters["weight"].detach()
    for name in names or ("default",):
        weight = dense_weight(weight, dense_q(layer.hra_u[name].detach(), anchor=layer.hra_u.anchor(name)))
    return weight.clone()


def folds(model: nn.Module, text: str, names: str | None = None) -> None:
    """Fold, and look at the whole message of the one warning."""
    with pytest.warns(hra_fx.HRAWarning) as caught:
        hra_fx.fold(model, names)
    assert [str(warning.message) for warning in caught] == [text]


def test_a_head_tied_to_an_embedding_is_untied() -> None:
    model = adapted(Tied(), "head", "body")
    before, wanted, output = model.embed.weight.detach().clone(), oracle(model.head), model(TOKENS).detach()
    held = model.embed.weight
    folds(
        model,
        "untied: head (from embed.weight). Each has its own weight now, so a saved model is larger.",
    )
    assert model.embed.weight is held
    assert torch.equal(model.embed.weight, before)
    assert relative_error(model.head.weight, wanted) < 1e-12
    assert relative_error(model(TOKENS), output) < 1e-12
    assert type(model.head) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(model.state_dict()) == list(Tied().state_dict())


def test_the_plan_shows_what_will_be_untied_and_changes_nothing() -> None:
    model = adapted(Tied(), "head", "body")
    plan = hra_fx.plan_fold(model)
    assert {layer.path: layer.untied for layer in plan.layers} == {"body": (), "head": ("embed.weight",)}
    assert re.search(r"^head .* untied from embed\.weight$", str(plan), re.MULTILINE)
    assert "untied" not in next(line for line in str(plan).splitlines() if line.startswith("body"))
    assert model.head.hra_base is model.embed.weight


def test_a_tied_head_that_is_left_out_stays_tied() -> None:
    model = adapted(Tied(), "body")
    wanted = oracle(model.body)
    hra_fx.fold(model)
    assert relative_error(model.body.weight, wanted) < 1e-12
    assert model.head.weight is model.embed.weight


def test_a_tied_head_that_the_folded_adapter_leaves_alone_stays_tied() -> None:
    model = adapted(Tied(), "body")
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=2, target_modules=["head"]))
    hra_fx.fold(model, "default")
    assert model.head.hra_base is model.embed.weight
    assert list(model.head.hra_u) == ["other"]


def test_of_two_adapters_on_a_tied_head_one_is_folded_and_the_other_acts_on() -> None:
    model = adapted(Tied(), "head")
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=2, target_modules=["head"]))
    hra_fx.set_adapter(model, ["default", "other"])
    turn(model)
    wanted, output, embedding = oracle(model.head), model(TOKENS).detach(), model.embed.weight.detach().clone()
    with pytest.warns(hra_fx.HRAWarning, match=r"^untied: head \(from embed\.weight\)"):
        hra_fx.fold(model, "default")
    assert relative_error(model.head.hra_base, wanted) < 1e-12
    assert not model.head.hra_base.requires_grad
    assert relative_error(model(TOKENS), output) < 1e-12
    assert torch.equal(model.embed.weight, embedding)
    hra_fx.fold(model)
    assert relative_error(model(TOKENS), output) < 1e-12
    assert model.head.weight.requires_grad


@pytest.mark.parametrize("paths", [("0", "1"), ("0",), ("1",)])
def test_two_layers_over_one_parameter_part(paths: tuple[str, ...]) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().to(F64).clone()
    adapted(model, *paths)
    wanted = {path: oracle(model.get_submodule(path)) for path in paths}
    x = torch.randn(3, 6, dtype=F64)
    output = model(x).detach()
    with pytest.warns(hra_fx.HRAWarning, match=r"^untied: "):
        hra_fx.fold(model)
    assert model[0].weight is not model[1].weight
    for path in ("0", "1"):
        assert relative_error(model.get_submodule(path).weight, wanted.get(path, before)) < 1e-12
        assert path in paths or torch.equal(model.get_submodule(path).weight, before)
    assert relative_error(model(x), output) < 1e-12


def test_two_layers_with_equal_vectors_part_too() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    adapted(model, "0", "1", r=2)
    with torch.no_grad():
        model[1].hra_u["default"].copy_(model[0].hra_u["default"])
    wanted = oracle(model[0])
    folds(
        model,
        "untied: 0 (from 1.weight), 1 (from 0.weight). Each has its own weight now, so a saved model is larger.",
    )
    assert relative_error(model[0].weight, wanted) < 1e-12
    assert torch.equal(model[0].weight, model[1].weight)


def test_a_view_of_a_bigger_tensor_parts_from_it() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).to(F64)
    model[1].weight = nn.Parameter(model[0].weight.detach()[1:5])
    adapted(model, "1")
    bigger, wanted = model[0].weight.detach().clone(), oracle(model[1])
    folds(model, "untied: 1 (from 0.weight). Each has its own weight now, so a saved model is larger.")
    assert torch.equal(model[0].weight, bigger)
    assert relative_error(model[1].weight, wanted) < 1e-12
    assert model[1].weight.untyped_storage().nbytes() == 4 * 6 * 8


def test_a_buffer_over_the_weight_keeps_its_values() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 4)).to(F64)
    model[0].register_buffer("mirror", model[0].weight.detach())
    adapted(model, "0")
    mirror, wanted = model[0].mirror.clone(), oracle(model[0])
    folds(model, "untied: 0 (from 0.mirror). Each has its own weight now, so a saved model is larger.")
    assert torch.equal(model[0].mirror, mirror)
    assert relative_error(model[0].weight, wanted) < 1e-12


def test_an_untied_weight_keeps_its_strides() -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).to(F64).to(memory_format=torch.channels_last)
    model[1].weight = model[0].weight
    adapted(model, "0")
    with pytest.warns(hra_fx.HRAWarning):
        hra_fx.fold(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("guard", [torch.inference_mode, torch.no_grad])
def test_an_untied_weight_can_be_trained_wherever_it_was_folded(guard: Any) -> None:
    model = adapted(Tied(), "head")
    with guard(), pytest.warns(hra_fx.HRAWarning):
        hra_fx.fold(model)
    model(TOKENS).sum().backward()
    assert model.head.weight.grad is not None


def test_a_layer_by_two_paths_is_not_tied_to_itself() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model.append(model[0])
    adapted(model, "0")
    held, wanted = model[0].hra_base, oracle(model[0])
    hra_fx.fold(model)
    assert model[2] is model[0]
    assert model[0].weight is held
    assert relative_error(model[0].weight, wanted) < 1e-12


def test_a_layer_by_two_paths_that_is_tied_stays_one_layer() -> None:
    model: Any = Tied()
    model.again = model.head
    adapted(model, "head")
    with pytest.warns(hra_fx.HRAWarning, match=r"^untied: head \(from embed\.weight\)"):
        hra_fx.fold(model)
    assert model.again is model.head
    assert model.again.weight is model.head.weight
    assert model.head.weight is not model.embed.weight


def test_a_part_does_not_change_what_it_is_tied_to_outside() -> None:
    model = adapted(Tied(), "head", "body")
    embedding, wanted = model.embed.weight.detach().clone(), oracle(model.head)
    hra_fx.fold(model.head)
    assert torch.equal(model.embed.weight, embedding)
    assert relative_error(model.head.weight, wanted) < 1e-12


def test_a_fold_that_fails_leaves_all_tied() -> None:
    model = adapted(Tied(), "head", "body")
    with torch.no_grad():
        model.body.hra_u["default"].fill_(float("nan"))
    with pytest.raises(hra_fx.FoldError, match="not finite"):
        hra_fx.fold(model)
    assert model.head.hra_base is model.embed.weight


def test_a_merge_writes_in_place_and_is_refused() -> None:
    model = adapted(Tied(), "head")
    output = model(TOKENS)
    text = (
        "head.weight: it shares memory with embed.weight, which merging in place would change too. Untie it first "
        "(layer.weight = torch.nn.Parameter(layer.weight.detach().clone()) and config.tie_word_embeddings = False), or "
        "call hra_fx.fold, which unties it."
    )
    with pytest.raises(hra_fx.FoldError, match=f"^{re.escape(text)}$"):
        hra_fx.merge_adapter(model)
    assert torch.equal(model(TOKENS), output)


@pytest.mark.parametrize("saved", [["embed"], ["embed", "body"]])
def test_a_reflected_head_beside_a_trained_copy_of_its_embedding(saved: list[str]) -> None:
    model = adapted(Tied(), "head", modules_to_save=saved)
    old = model.head.weight.detach().clone()
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    trained, wanted, output = model.embed.weight.detach().clone(), oracle(model.head), model(TOKENS).detach()
    assert not torch.equal(trained, old)
    # The base model's embedding goes with the fold, so nothing is left to part from.
    assert {layer.untied for layer in hra_fx.plan_fold(model).layers} == {()}
    hra_fx.fold(model)
    assert torch.equal(model.embed.weight, trained)
    assert relative_error(model.head.weight, wanted) < 1e-12
    assert relative_error(model(TOKENS), output) < 1e-12


def test_a_reflected_head_whose_embedding_another_adapter_trained() -> None:
    model = adapted(Tied(), "head")
    base = copy.deepcopy(model)
    old = model.embed.weight.detach().clone()
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=2, target_modules=["body"], modules_to_save=["embed"]))
    wanted, output = oracle(model.head), model(TOKENS).detach()
    with pytest.warns(hra_fx.HRAWarning, match=r"^untied: head \(from embed\.weight\)"):
        hra_fx.fold(model, "default")
    hra_fx.set_adapter(model, "other")
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    hra_fx.delete_adapter(model, "other")
    assert torch.equal(model.embed.weight, old)
    assert relative_error(model.head.weight, wanted) < 1e-12
    assert relative_error(model(TOKENS), output) < 1e-12
    assert relative_error(base(TOKENS), output) < 1e-12


def test_an_adapter_of_a_tied_head_is_saved_and_loaded_as_any_other(tmp_path: Any) -> None:
    torch.manual_seed(3)
    base = Tied().to(F64)
    other = copy.deepcopy(base)
    model = adapted(base, "head", r=2)
    hra_fx.save_adapter(model, tmp_path)
    hra_fx.load_adapter(other, tmp_path)
    assert relative_error(other(TOKENS), model(TOKENS)) < 1e-14
    assert other.head.hra_base is other.embed.weight
