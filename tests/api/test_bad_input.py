"""Configurations and targets that no model can be given, refused by `transform` in words that say what to do."""

from __future__ import annotations

import pytest
from adapting import config
from refusals import mlp, refused
from torch import nn

import hra_fx
from hra_fx.errors import ConfigError, SelectionError


@pytest.mark.parametrize("r", [0, -1, 2.0, "8", None, True])
def test_rank(r: object) -> None:
    with pytest.raises(ConfigError, match="`r` must be a positive int, got "):
        hra_fx.transform(mlp(), hra_fx.HRAConfig(r=r, target_modules=["0"]))


def test_unknown_field() -> None:
    with pytest.raises(ConfigError, match=r"HRAConfig has no field `rank`\. Did you mean `r`"):
        hra_fx.transform(mlp(), hra_fx.HRAConfig(rank=8, target_modules=["0"]))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_regex_that_does_not_compile(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"`{field}`: '\(0' is not a valid regular expression"):
        hra_fx.transform(mlp(), hra_fx.HRAConfig(**({"target_modules": ["0"]} | {field: "(0"})))


def test_layers_pattern_without_indices() -> None:
    with pytest.raises(ConfigError, match="`layers_pattern` is specified, `layers_to_transform` must also"):
        hra_fx.transform(mlp(), hra_fx.HRAConfig(target_modules=["0"], layers_pattern="layers"))


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Embedding(3, 4), "Embedding"),
        (nn.ConvTranspose1d(3, 4, 1), "ConvTranspose1d"),
        (nn.ConvTranspose2d(3, 4, 1), "ConvTranspose2d"),
        (nn.LayerNorm(4), "LayerNorm"),
        (nn.Sequential(nn.Linear(4, 4)), "Sequential"),
        (nn.Bilinear(4, 4, 4), "Bilinear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_target_of_another_type(layer: nn.Module, kind: str) -> None:
    model = nn.ModuleDict({"proj": layer, "lin": nn.Linear(4, 4)})
    message = refused(model, config("proj", "lin"), SelectionError)
    assert message.startswith(f"proj: `target_modules` matches this {kind}, but only ")


def test_nothing_matched_names_near_misses() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
    message = refused(model, config("qproj"), SelectionError)
    assert "matches no module of ModuleDict" in message
    assert "Did you mean 'q_proj'" in message


def test_nothing_left_after_exclusion() -> None:
    message = refused(mlp(), config("0", exclude_modules=["0"]), SelectionError)
    assert "none is left after exclude_modules=['0']" in message
