"""Functions of hra_fx on a model of PEFT: they leave it as it is, and `fold` uses it up."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapting import picture
from oracles import dense_q, dense_weight, relative_error
from peft_sides import (
    CASES,
    F64,
    net,
    peft_warnings_ignored,
    randomised_by_peft,
    same_tensors,
    saved_by_peft,
    tokens,
    with_two_by_peft,
)
from torch import Tensor, nn

import hra_fx

STEPS: dict[str, Callable[[Any, Path], object]] = {
    "report": lambda model, folder: hra_fx.report(model),
    "save_adapter": lambda model, folder: hra_fx.save_adapter(model, folder / "one", "default"),
    "save_as_lora": lambda model, folder: hra_fx.save_as_lora(model, folder / "lora"),
    "convert_to_lora": lambda model, folder: hra_fx.convert_to_lora(model),
    "visualize": lambda model, folder: hra_fx.visualize(model, folder / "model.svg"),
    "to_networkx": lambda model, folder: hra_fx.to_networkx(model),
}


def is_as_before(model: Any, step: Callable[[], object]) -> None:
    """Run a function. All modules, their attributes and flags, outputs and gradients are then those from before."""

    def state() -> list[object]:
        order = [(path, [*module._modules]) for path, module in model.named_modules()]
        return [picture(model), order, copy.deepcopy(model.peft_config)]

    def gradients() -> list[Tensor]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        output = model(tokens())
        return [output.detach(), *torch.autograd.grad(output.sum(), trained, allow_unused=True, materialize_grads=True)]

    wanted, before = gradients(), state()
    step()
    assert state() == before
    assert all(map(torch.equal, gradients(), wanted))


@pytest.mark.needs("peft>=0.21")
@pytest.mark.parametrize("case", ["linear and convolution", "trained modules", "all biases", "two adapters"])
def test_a_model_of_peft_stays_as_it_is(case: str, tmp_path: Path) -> None:
    """And its file is that of PEFT."""
    model = with_two_by_peft() if case == "two adapters" else randomised_by_peft(case)
    for step in STEPS.values():
        is_as_before(model, lambda step=step: step(model, tmp_path))
    same_tensors(tmp_path / "one", saved_by_peft(model, tmp_path / "theirs"))


def test_after_an_error_a_model_of_peft_is_as_before(tmp_path: Path) -> None:
    """The adapters are not finite, or the model of PEFT does not fit its configuration."""
    for name in ("report", "save_adapter", "save_as_lora", "visualize", "fold"):
        model = with_two_by_peft()
        act = STEPS.get(name, lambda model, folder: hra_fx.fold(model))
        if name in ("report", "visualize"):
            model.peft_config["other"].target_modules = {"query"}
        else:
            with torch.no_grad():
                model.base_model.model.body.layers[1].query.hra_u["default"][0, 0] = torch.nan
                model.base_model.model.body.layers[1].query.hra_u["other"][0, 0] = torch.nan
        before = picture(model)
        with pytest.raises(hra_fx.HRAError, match=r"finite|does not match the adapter's configuration"):
            act(model, tmp_path)
        assert picture(model) == before, name


def dense(layer: Any, *names: str) -> tuple[Tensor, Tensor]:
    """`W` and `W Q_a Q_b ...` of a layer of PEFT, in float64."""
    weight = rotated = layer.base_layer.weight.detach().double()
    for name in names or layer.active_adapters:
        if name in layer.hra_u:
            rotated = dense_weight(rotated, dense_q(layer.hra_u[name].detach(), apply_GS=layer.hra_apply_GS[name]))
    return weight, rotated


def layers_of(model: Any) -> dict[str, Any]:
    base = model.get_base_model()
    return {path: layer for path, layer in base.named_modules() if isinstance(layer, peft.tuners.hra.HRALayer)}


@pytest.mark.parametrize("case", [*CASES, "two adapters"])
def test_report_lora_and_fold_are_those_of_the_dense_product(case: str, tmp_path: Path) -> None:
    """And the fold uses up the model."""
    model = with_two_by_peft() if case == "two adapters" else randomised_by_peft(case)
    report, layers, output = hra_fx.report(model), layers_of(model), model(tokens())
    pairs = [(path, name) for path, layer in layers.items() for name in layer.hra_u]
    assert sorted((row.path, row.adapter) for row in report) == sorted(pairs)
    kinds = {path for path, part in net().named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))}
    assert {layer.path for layer in report.skipped} == kinds - layers.keys() - {*report.trained_in_full}
    for row in report:
        weight, rotated = dense(layers[row.path], row.adapter)
        assert row.weight_change == pytest.approx(float((rotated - weight).norm() / weight.norm()), rel=1e-9)
        assert row.active is (row.adapter in model.active_adapters)
    hra_fx.save_as_lora(model, tmp_path)
    with peft_warnings_ignored():
        served = peft.PeftModel.from_pretrained(net(F64), tmp_path)
    assert relative_error(served(tokens()), output) < 1e-5
    wanted = {path: dense(layer)[1] for path, layer in layers.items()}
    base, plain = model.get_base_model(), net()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", hra_fx.HRAWarning)
        folded = hra_fx.fold(model)
    text = "adapters ['default'] were not active and are removed"
    assert [text in str(one.message) for one in told] == ([True] if case == "two adapters" else [])
    assert folded is base and type(folded) is type(plain)
    assert [*folded.state_dict()] == [*plain.state_dict()]
    assert [(path, type(part)) for path, part in folded.named_modules()] == [
        (path, type(part)) for path, part in plain.named_modules()
    ]
    for path, weight in wanted.items():
        assert relative_error(folded.get_submodule(path).weight, weight) < 1e-14, path
    for whole in (folded, model):
        assert relative_error(whole(tokens()), output) < 1e-6  # PEFT computes some layers in float32
    assert model.get_base_model() is folded
    for use in (lambda: model.save_pretrained("unused"), lambda: model.base_model.merge_and_unload()):
        with pytest.raises(hra_fx.AdapterError, match=r"were folded or removed\. Use the base model, a Net: the"):
            use()


def test_models_that_contain_a_model_of_peft() -> None:
    """A wrapper such as DistributedDataParallel, a user's module, and the tuner without a `PeftModel`."""
    whole = nn.Module()
    whole.encoder = randomised_by_peft()
    wrappers = (nn.DataParallel, torch.compile, lambda model: model.base_model)
    for model in (whole, *(wrap(randomised_by_peft()) for wrap in wrappers)):
        before = picture(model)
        assert [row.path for row in hra_fx.report(model)][-1] == "conv"
        assert picture(model) == before
        folded = hra_fx.fold(model)
        assert type(folded) is type(net()) and folded in set(model.modules())
    model = randomised_by_peft()
    with pytest.raises(hra_fx.AdapterError, match=r"^Body is a part of a model with PEFT adapters\. Pass the whole"):
        hra_fx.report(model.get_base_model().body)
    with pytest.raises(hra_fx.AdapterError, match=r"^ModuleList contains 2 models with PEFT adapters\. Pass one of"):
        hra_fx.report(nn.ModuleList([model, randomised_by_peft()]))
