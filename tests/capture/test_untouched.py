"""`transform` changes what it documents and nothing else; after an error it has changed nothing at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture.checks import fresh, inputs
from capture.models import Convolutions, Host, Stack, Two
from torch import nn

import hra_fx
import hra_fx.api.transform
from hra_fx.errors import GraphInvariantError, HRAError

ADDED = {"_hra_record", "_hra_region"}


def picture(model: nn.Module) -> dict[str, Any]:
    """All that there is to see of a model: classes, attributes, containers, tensors, versions."""
    seen: dict[str, Any] = {}
    for path, part in model.named_modules():
        seen[f"{path}:class"] = type(part)
        for key, value in vars(part).items():
            content = tuple((k, id(v)) for k, v in value.items()) if isinstance(value, dict) else repr(value)
            seen[f"{path}:{key}"] = (id(value), content)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen[f"tensor {name}"] = (id(tensor), tensor._version, tensor.requires_grad, tensor.data_ptr(), tensor.tolist())
    return seen


def mixed(model: nn.Module) -> nn.Module:
    """With modes and flags that are not all the same."""
    fresh(model)
    model.train()
    for index, part in enumerate(model.modules()):
        part.training = index % 3 != 1
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    return model


def config(model: nn.Module, **options: Any) -> hra_fx.HRAConfig:
    names = [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    return hra_fx.HRAConfig(r=2, target_modules=names, **options)


@pytest.mark.parametrize("make", [Two, Stack, Host, Convolutions])
def test_only_what_is_documented_changes(make: type[nn.Module]) -> None:
    model = mixed(make())
    before = picture(model)
    sites = set(config(model).target_modules)
    hra_fx.transform(model, config(model))
    after = picture(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name for name, flag in flags.items() if flag} == {f"{site}.hra_u.default" for site in sites}
    for key, value in before.items():
        path, _, name = key.partition(":")
        if key.startswith("tensor "):
            assert after[key][:2] == value[:2] and after[key][3:] == value[3:], key
        elif name == "_modules" and path in sites:
            assert after[key][1][:-1] == value[1] and after[key][1][-1][0] == "hra_u"
        elif name != "class":
            assert after[key] == value, key
    added = {key for key in after.keys() - before.keys() if "hra_u" not in key}
    assert {key.partition(":")[2] for key in added} <= ADDED, added


@pytest.mark.parametrize("make", [Two, Stack, Host, Convolutions])
def test_fold_leaves_only_other_weights(make: type[nn.Module]) -> None:
    model = mixed(make())
    before = picture(model)
    hra_fx.fold(hra_fx.transform(model, config(model)))
    after = picture(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key.startswith("tensor "):
            assert (after[key][0], after[key][2], after[key][3]) == (value[0], value[2], value[3]), key
            assert torch.allclose(torch.tensor(after[key][4]), torch.tensor(value[4]))
        else:
            assert after[key] == value, key


def on_meta() -> nn.Module:
    model = mixed(Stack())
    model.head.weight = nn.Parameter(torch.empty(5, 8, device="meta"))
    return model


def hooked_by_accelerate() -> nn.Module:
    model = mixed(Stack())
    model.blocks[1]._hf_hook = object()
    return model


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(Two().double().first) and nn.Sequential(
        nn.Linear(6, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    )


ERRORS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "nothing matches": (lambda: mixed(Stack()), {"target_modules": ["no_such"]}),
    "no Linear": (lambda: mixed(Stack()), {"target_modules": ["norm"]}),
    "no default targets": (lambda: mixed(Stack()), {"target_modules": None}),
    "rank over width": (lambda: mixed(Stack()), {"r": 9, "apply_GS": True}),
    "meta weight": (on_meta, {}),
    "accelerate": (hooked_by_accelerate, {}),
    "parametrized": (parametrized, {"target_modules": ["0", "1"]}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_leaves_the_model_as_it_was(name: str) -> None:
    make, options = ERRORS[name]
    model = make()
    before = _safe(model)
    state = torch.get_rng_state()
    fields = {"r": 2, "target_modules": [n for n, p in model.named_modules() if isinstance(p, nn.Linear)], **options}
    with pytest.raises(HRAError):
        hra_fx.transform(model, hra_fx.HRAConfig(**fields))
    assert _safe(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def _safe(model: nn.Module) -> dict[str, Any]:
    """A picture without values, for models with tensors on the meta device."""
    seen: dict[str, Any] = {}
    for path, part in model.named_modules():
        seen[f"{path}:class"] = type(part)
        for key, value in vars(part).items():
            content = tuple((k, id(v)) for k, v in value.items()) if isinstance(value, dict) else repr(value)
            seen[f"{path}:{key}"] = (id(value), content)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen[f"tensor {name}"] = (id(tensor), tensor._version, tensor.requires_grad)
    return seen


@pytest.mark.parametrize("step", ["swap", "keep_record", "freeze", "VerifyPass", "InsertPass"])
@pytest.mark.parametrize("make", [Stack, Host])
def test_an_error_half_way_takes_every_step_back(
    make: type[nn.Module], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure put into each step of the way, at its second turn where it has one."""
    model = mixed(make())
    before = picture(model)
    where = hra_fx.api.transform if hasattr(hra_fx.api.transform, step) and step != "swap" else hra_fx.model.inject
    real, turns = getattr(where, step), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        turns.append(1)
        if len(turns) == (2 if step == "swap" else 1):
            raise GraphInvariantError("node 'x': put there by the test.")
        return real(*args, **kwargs)

    monkeypatch.setattr(where, step, fails)
    with pytest.raises(GraphInvariantError, match="put there by the test"):
        hra_fx.transform(model, config(model))
    assert turns and picture(model) == before
    monkeypatch.undo()
    hra_fx.transform(model, config(model))
    assert len(hra_fx.report(model)) == len(set(config(copy.deepcopy(make())).target_modules))


def test_a_fold_that_fails_leaves_the_model_as_it_was() -> None:
    model = hra_fx.transform(mixed(Stack()), config(Stack()))
    with torch.no_grad():
        model.head.hra_u["default"][0, 0] = float("nan")
    before = _safe(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(hra_fx.FoldError, match="head"):
        hra_fx.fold(model)
    assert _safe(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(9.0), weights[name].nan_to_num(9.0))


def test_gradients_of_the_base_are_not_made() -> None:
    model = hra_fx.transform(fresh(Stack()), config(Stack()))
    model(inputs(3, 6)).sum().backward()
    assert all((p.grad is not None) == ("hra_u" in name) for name, p in model.named_parameters())
