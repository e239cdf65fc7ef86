"""select() on whole models, compared with PEFT for the configurations of a table.

`test_selection_like_peft.py` compares random configurations.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
from named_models import (
    MAKERS,
    Nested,
    built,
    tiny_opt,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from torch import nn
from transformers.pytorch_utils import Conv1D

from hra_fx.config import HRAConfig
from hra_fx.errors import HRAWarning, SelectionError
from hra_fx.selection.origin import DEFAULT_TARGETS
from hra_fx.selection.select import is_target, resolve_targets, saved_modules, select


def in_pefts_kinds(model: nn.Module) -> nn.Module:
    """A copy of `model` with a kind that PEFT has for each of ours that it refuses; the names are the same."""
    copied = copy.deepcopy(model)
    for path, module in list(copied.named_modules()):
        if isinstance(module, Conv1D):
            copied.set_submodule(path, nn.Linear(module.nx, module.nf))
        elif isinstance(module, nn.Conv1d):
            copied.set_submodule(path, nn.Conv2d(module.in_channels, module.out_channels, 1))
    return copied


def peft_layers(model: nn.Module, **kwargs: Any) -> list[str] | None:
    """The layers that PEFT really wraps in a copy of `model`, in its order; None where it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tuner = peft.HRAModel(in_pefts_kinds(model), peft.HRAConfig(r=2, **kwargs), "default")
        except (ValueError, TypeError):
            return None
    return list(tuner.targeted_module_names)


def our_layers(model: nn.Module, **kwargs: Any) -> list[str] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HRAWarning)
        try:
            return list(select(model, HRAConfig(**kwargs)))
        except SelectionError:
            return None


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS", "CAUSAL_LM"])
def test_all_linear_and_defaults(make: Callable[[], nn.Module], task_type: str | None) -> None:
    model = built(make)
    for targets in ("all-linear", None):
        kwargs = {"target_modules": targets, "task_type": task_type}
        assert our_layers(model, **kwargs) == peft_layers(model, **kwargs)


def test_long_lists_lose_whole_paths_to_layer_indices_as_in_peft() -> None:
    model = built(tiny_opt)
    everything = list(select(model, HRAConfig(target_modules="all-linear")))
    for size in (18, 17, 5):
        kwargs = {"target_modules": everything[:size], "layers_to_transform": [0]}
        assert our_layers(model, **kwargs) == peft_layers(model, **kwargs) == everything[:size]
    more = [*everything, "absent.one", "absent.two"]
    kwargs = {"target_modules": more, "layers_to_transform": [0]}
    assert our_layers(model, **kwargs) == peft_layers(model, **kwargs) == everything[:6]


def test_long_lists_that_cannot_become_shorter_stay_whole_paths_as_in_peft() -> None:
    leaves = {f"fc{i}": nn.Linear(2, 2) for i in range(24)}
    model = nn.ModuleDict({"m": nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict(leaves)])})})
    paths = [f"m.h.0.{name}" for name in leaves]
    kwargs = {"target_modules": paths, "layers_to_transform": [1]}
    assert our_layers(model, **kwargs) == peft_layers(model, **kwargs) == paths


@pytest.mark.parametrize(
    ("kwargs", "path", "expected"),
    [
        ({"target_modules": ["q"]}, "q", True),
        ({"target_modules": ["q"]}, "a.q", True),
        ({"target_modules": ["q"]}, "a.seq", False),
        ({"target_modules": ["q"]}, "q.a", False),
        ({"target_modules": ["a.q"]}, "b.a.q", True),
        ({"target_modules": ["a.q"]}, "aa.q", False),
        ({"target_modules": ["*.q"]}, "a.q", False),
        ({"target_modules": "q"}, "a.q", False),
        ({"target_modules": r".*\.q"}, "a.q", True),
        ({"target_modules": r".*\.q"}, "a.q.b", False),
        ({"target_modules": []}, "q", False),
        ({"target_modules": None}, "q", False),
        ({"target_modules": ".*"}, "", False),
        ({"target_modules": [""]}, "", False),
        ({"target_modules": ["q"], "exclude_modules": ["a.q"]}, "b.a.q", False),
        ({"target_modules": ["q"], "exclude_modules": ["a"]}, "a.q", True),
        ({"target_modules": ["q"], "exclude_modules": "a.*"}, "a.q", False),
        ({"target_modules": ["q"], "exclude_modules": "a"}, "a.q", True),
        ({"target_modules": ["q"], "modules_to_save": ["a"]}, "b.a.c.q", False),
        ({"target_modules": ["q"], "modules_to_save": ["a"]}, "b.aa.q", True),
        ({"target_modules": ["q"], "modules_to_save": []}, "a.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1}, "m.h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1}, "h.1.q", False),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "h"}, "h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": ["x", "h"]}, "h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "x"}, "h.1.q", False),
        ({"target_modules": ["q"], "layers_to_transform": 1}, "m.h.0.e.1.q", False),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "e"}, "m.h.0.e.1.q", True),
        ({"target_modules": ["m.h.0.q"], "layers_to_transform": 1}, "m.h.0.q", True),
        ({"target_modules": ["1"], "layers_to_transform": 1}, "m.h.1", False),
        ({"target_modules": ".*"}, "a.q.hra_u", False),
        ({"target_modules": ["default"]}, "a.q.hra_u.default", False),
        ({"target_modules": ".*"}, "a.hra_unlike", True),
    ],
)
def test_is_target(kwargs: dict[str, Any], path: str, expected: bool) -> None:
    assert is_target(HRAConfig(**kwargs), path) is expected


def test_is_target_with_resolved_targets() -> None:
    config = HRAConfig(target_modules="all-linear", exclude_modules=["fc2"])
    targets = resolve_targets(built(tiny_opt), config)
    assert is_target(config, "model.decoder.layers.0.fc1", targets)
    assert not is_target(config, "model.decoder.layers.0.fc1")
    assert not is_target(config, "model.decoder.layers.0.fc2", targets)
    assert not is_target(config, "lm_head", targets)


def test_default_targets_are_pefts() -> None:
    assert {name: t if isinstance(t, str) else list(t) for name, t in DEFAULT_TARGETS.items()} == PEFT_DEFAULTS


class Configured(nn.Module):
    """A model whose `config` is what it is given."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(2, 2), "o": nn.Linear(2, 2)}) for _ in range(2))


class Speaks:
    def to_dict(self) -> dict[str, str]:
        return {"model_type": "opt"}


class Typed:
    model_type = "opt"


@pytest.mark.parametrize("config", [{"model_type": "opt"}, Typed(), Speaks()])
def test_default_targets_by_every_kind_of_config(config: object) -> None:
    assert list(select(Configured(config), HRAConfig())) == ["layers.0.q_proj", "layers.1.q_proj"]


def test_nothing_is_changed() -> None:
    model, config = built(Nested), HRAConfig(target_modules="all-linear", modules_to_save=["head"])
    before = config.to_dict(), [(path, id(m), type(m)) for path, m in model.named_modules()]
    with pytest.raises(SelectionError):
        select(model, config)  # 'head' also ends 'sub_head'
    config.exclude_modules = ["sub_head"]
    assert "sub_head" not in select(model, config)
    config.exclude_modules = None
    assert before == (config.to_dict(), [(path, id(m), type(m)) for path, m in model.named_modules()])


def test_lists_put_into_a_config_later_work() -> None:
    config = HRAConfig()
    config.target_modules = ["fc1"]
    assert len(select(built(tiny_opt), config)) == 3


def test_a_layer_on_two_paths_is_listed_once() -> None:
    chosen = select(built(Nested), HRAConfig(target_modules=["seq"]))
    assert list(chosen) == [*(f"layers.{i}.seq" for i in range(3)), *(f"encoder.h.{i}.seq" for i in range(2))]


def test_what_an_earlier_adapter_added_is_not_walked() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].hra_u = nn.ModuleDict({"inner": nn.Linear(2, 2)})
    for targets in ("all-linear", ".*"):
        assert list(select(model, HRAConfig(target_modules=targets))) == ["0", "1"]
    with pytest.raises(SelectionError, match="matches no module of Sequential"):
        select(model, HRAConfig(target_modules=["inner"]))
    with pytest.raises(SelectionError, match="`modules_to_save`: there is no module 'inner'"):
        select(model, HRAConfig(target_modules=["0"], modules_to_save=["inner"]))


def test_saved_modules_end_with_an_entry() -> None:
    model = built(Nested)
    assert list(saved_modules(model, HRAConfig(modules_to_save=["head"]))) == ["head", "sub_head"]
    assert "encoder.again.norm" in saved_modules(model, HRAConfig(modules_to_save=["norm"]))
    assert saved_modules(model, HRAConfig(modules_to_save=["nope"])) == {}
    assert saved_modules(model, HRAConfig()) == saved_modules(model, HRAConfig(modules_to_save=[])) == {}
