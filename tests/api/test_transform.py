"""hra_fx.transform: the adapted model, a second call, and errors; the public names are consistent."""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import types
import warnings
from typing import Any

import peft
import pytest
import torch
from adapting import config, mlp, picture, randomise
from model.many import refuses
from torch import Tensor, nn

import hra_fx
from hra_fx import errors
from hra_fx.errors import AdapterError, ConfigError, SelectionError, UnsupportedLayerError


class Wrapped(nn.Module):
    """A body and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[..., :4])


# ---- the adapted model ----


def test_training_flags_are_kept_and_vectors_are_trainable_under_no_grad() -> None:
    model = mlp()
    model.eval()
    model[0].train()
    with torch.no_grad():
        hra_fx.transform(model, config("0", "3"))
    assert [module.training for module in (model, *model)] == [False, True, False, False, False]
    assert [model[0].hra_u.training, model[3].hra_u.training] == [True, False]
    model(torch.randn(2, 6)).sum().backward()
    assert model[0].hra_u["default"].grad is not None


def test_a_start_that_is_not_the_base_model_is_warned_about_unless_it_is_wanted() -> None:
    for fields, cause in (
        ({"r": 3}, "r = 3 is odd"),
        ({"rank_pattern": {"3": 1}, "r": 2}, "r = 1 is odd"),
        ({"apply_GS": True}, "apply_GS=True"),
    ):
        text = f"^adapter 'default': {cause}, so it does not start as the base model, and trains vectors, which learn "
        with pytest.warns(
            errors.HRAWarning, match=text + "less than pairs. Use an even r without Gram-Schmidt.$"
        ) as seen:
            hra_fx.transform(mlp(), config("0", "3", **fields))
        assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hra_fx.transform(mlp(), config("0", r=3, init_weights=False))
        hra_fx.transform(mlp(), config("0", r=4))


# ---- a second call ----


def test_a_second_call_changes_nothing() -> None:
    model = hra_fx.transform(mlp(), config("0", "3"))
    randomise(model)
    before, state = picture(model), copy.deepcopy(model.state_dict())
    assert hra_fx.transform(model, config("0", "3")) is model
    assert picture(model) == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


# ---- errors ----


@pytest.mark.parametrize(
    ("part", "target", "fields", "name", "message"),
    [
        ("", "body.0", {"r": 4}, "default", r"adapter 'default': body\.0 already has reflections of default, of"),
        (
            "",
            "body.0",
            {},
            "other",
            r"adapter 'other': body\.0 already has reflections of default.*delete_adapter\(model, 'default'\)",
        ),
        ("body", "3", {}, "default", r"0 already has reflections"),
        ("parent", "last", {}, "default", r"model\.body\.0 already has reflections of default"),
    ],
)
def test_an_adapted_model_its_parts_and_its_parents_are_refused(
    part: str, target: str, fields: dict[str, Any], name: str, message: str
) -> None:
    model = hra_fx.transform(Wrapped(), config("body.0"))
    parent = nn.ModuleDict({"model": model, "last": nn.Linear(4, 2)})
    given = parent if part == "parent" else model.get_submodule(part)
    with refuses(parent, message):
        hra_fx.transform(given, config(target, **fields), name)


def test_a_configuration_that_was_edited_is_checked_and_compared_again() -> None:
    model, settings = mlp(), config("0")
    settings.r = 0
    with refuses(model, "`r` must be a positive int", ConfigError):
        hra_fx.transform(model, settings)
    settings.r = 3
    hra_fx.transform(model, settings)
    settings.r = 5
    with refuses(model, "already has reflections of default, of another name or configuration"):
        hra_fx.transform(model, settings)


def test_arguments_of_another_type_are_refused() -> None:
    for wrong in ("bert-base", nn.Linear, None):
        with pytest.raises(AdapterError, match=r"^`model` must be a torch\.nn\.Module, got "):
            hra_fx.transform(wrong, config("0"))
    lora = peft.LoraConfig(target_modules=["0"])
    for wrong, kind in ((None, "builtins.NoneType"), ({"r": 8}, "builtins.dict"), (lora, "peft.tuners.lora.config.Lo")):
        model = mlp()
        text = f"^`config` must be an hra_fx.HRAConfig or a peft.HRAConfig, got {kind}"
        with refuses(model, text, ConfigError):
            hra_fx.transform(model, wrong)


def test_a_model_that_is_itself_a_layer_is_refused() -> None:
    layer = nn.Linear(4, 4)
    for settings in (config(""), hra_fx.HRAConfig(target_modules=".*"), config("Linear")):
        text = r"^Linear contains no layer that can be adapted\."
        with refuses(layer, text, SelectionError):
            hra_fx.transform(layer, settings)
    model = hra_fx.transform(nn.Sequential(layer), hra_fx.HRAConfig(target_modules=".*"))
    assert next(iter(hra_fx.report(model))).path == "0"


def test_every_unsupported_layer_is_named_at_once() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=dtype) for dtype in (torch.complex64, None, torch.complex64)))
    text = r"^0 \(Linear\): .* Also unsupported: 2\.$"
    with refuses(model, text, UnsupportedLayerError):
        hra_fx.transform(model, config("0", "1", "2"))


# ---- public names: what is loaded lazily, what type checkers read, and the errors ----


def for_type_checkers() -> dict[str, str]:
    """Public name -> module, of the imports under `if TYPE_CHECKING`."""
    tree = ast.parse(inspect.getsource(hra_fx))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    return {alias.name: str(node.module).removeprefix("hra_fx.") for node in imports for alias in node.names}


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    assert for_type_checkers() == hra_fx._HOMES


def test_every_error_is_public_and_nothing_else() -> None:
    assert set(hra_fx.__all__) == {*hra_fx._HOMES, *errors.__all__}
    assert all(getattr(hra_fx, name) is getattr(errors, name) for name in errors.__all__)
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined - set(errors.__all__) == {"CaptureError"}  # caught inside the library


def test_a_module_that_another_thread_is_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch.distributed.tensor", "torch.distributed.fsdp", "torch.export", "peft"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    model = hra_fx.transform(nn.Sequential(nn.Linear(4, 4)), config("0"))
    assert hra_fx.get_peft_model_state_dict(model).keys() == {"base_model.model.0.hra_u"}
