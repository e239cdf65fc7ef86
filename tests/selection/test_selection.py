"""What `select` returns; `test_selection_like_peft.py` compares it with PEFT."""

from __future__ import annotations

from typing import Any

import pytest
from named_models import Nested, built, tiny_opt
from peft.utils.constants import TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from torch import nn

from hra_fx.config import HRAConfig
from hra_fx.errors import SelectionError
from hra_fx.selection.origin import DEFAULT_TARGETS
from hra_fx.selection.select import is_target, resolve_targets, saved_modules, select


@pytest.mark.parametrize(
    ("kwargs", "path", "expected"),
    [
        ({"target_modules": ["q"]}, "a.q", True),
        ({"target_modules": ["q"]}, "a.seq", False),
        ({"target_modules": ["q"]}, "q.a", False),
        ({"target_modules": ["a.q"]}, "b.a.q", True),
        ({"target_modules": ["a.q"]}, "aa.q", False),
        ({"target_modules": "q"}, "a.q", False),
        ({"target_modules": r".*\.q"}, "a.q.b", False),
        ({"target_modules": None}, "q", False),
        ({"target_modules": ".*"}, "", False),
        ({"target_modules": [""]}, "", False),
        ({"target_modules": ["q"], "exclude_modules": ["a.q"]}, "b.a.q", False),
        ({"target_modules": ["q"], "exclude_modules": ["a"]}, "a.q", True),
        ({"target_modules": ["q"], "exclude_modules": "a.*"}, "a.q", False),
        ({"target_modules": ["q"], "modules_to_save": ["a"]}, "b.a.c.q", False),
        ({"target_modules": ["q"], "modules_to_save": ["a"]}, "b.aa.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1}, "m.h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1}, "h.1.q", False),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "h"}, "h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": ["x", "h"]}, "h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "e"}, "m.h.0.e.1.q", True),
        ({"target_modules": ["m.h.0.q"], "layers_to_transform": 1}, "m.h.0.q", True),
        ({"target_modules": ["1"], "layers_to_transform": 1}, "m.h.1", False),
        ({"target_modules": ".*"}, "a.q.hra_u", False),
        ({"target_modules": ".*"}, "a.hra_unlike", True),
    ],
)
def test_is_target(kwargs: dict[str, Any], path: str, expected: bool) -> None:
    assert is_target(HRAConfig(**kwargs), path) is expected


def test_is_target_with_resolved_targets() -> None:
    config = HRAConfig(target_modules="all-linear", exclude_modules=["fc2"])
    targets = resolve_targets(built(tiny_opt), config)
    assert is_target(config, "model.decoder.layers.0.fc1", targets)
    assert not is_target(config, "model.decoder.layers.0.fc2", targets)


def test_default_targets_are_pefts() -> None:
    assert {name: t if isinstance(t, str) else list(t) for name, t in DEFAULT_TARGETS.items()} == PEFT_DEFAULTS


class Configured(nn.Module):
    """A model whose `config` is what it is given."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(2, 2), "o": nn.Linear(2, 2)}) for _ in range(2))


class Typed:
    model_type = "opt"


@pytest.mark.parametrize("config", [{"model_type": "opt"}, Typed()])
def test_default_targets_by_every_kind_of_config(config: object) -> None:
    assert list(select(Configured(config), HRAConfig())) == ["layers.0.q_proj", "layers.1.q_proj"]


def test_a_layer_on_two_paths_is_listed_once() -> None:
    chosen = select(built(Nested), HRAConfig(target_modules=["seq"]))
    assert list(chosen) == [*(f"layers.{i}.seq" for i in range(3)), *(f"encoder.h.{i}.seq" for i in range(2))]


def test_what_an_earlier_adapter_added_is_not_selected() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].hra_u = nn.ModuleDict({"inner": nn.Linear(2, 2)})
    for targets in ("all-linear", ".*"):
        assert list(select(model, HRAConfig(target_modules=targets))) == ["0", "1"]
    for fields in ({"target_modules": ["inner"]}, {"target_modules": ["0"], "modules_to_save": ["inner"]}):
        with pytest.raises(SelectionError, match=r"no module"):
            select(model, HRAConfig(**fields))


def test_saved_modules_end_with_an_entry() -> None:
    model = built(Nested)
    assert list(saved_modules(model, HRAConfig(modules_to_save=["head"]))) == ["head", "sub_head"]
    assert "encoder.again.norm" in saved_modules(model, HRAConfig(modules_to_save=["norm"]))
    assert saved_modules(model, HRAConfig()) == {}
