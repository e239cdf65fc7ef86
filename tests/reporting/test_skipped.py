"""The layers of models without an adapter, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from moe_models import built
from tiny import llama
from torch import nn

import hra_fx
from hra_fx import HRAConfig, report, transform


def reasons(model: Any) -> dict[str, str]:
    return {layer.path: layer.reason for layer in report(model).skipped}


def projection(layer: int, name: str = "q") -> str:
    return f"model.layers.{layer}.self_attn.{name}_proj"


def lists() -> nn.Module:
    return nn.ModuleDict({name: nn.Sequential(nn.Sequential(nn.Linear(4, 4))) for name in ("out", "blocks")})


#: The model, fields of the configuration, and the reasons of some layers.
CASES: list[tuple[Callable[[], Any], dict[str, Any], dict[str, str]]] = [
    (llama, {"target_modules": r".*\.0.*q_proj"}, {projection(1): r"not in target_modules=r'.*\.0.*q_proj'"}),
    (llama, {}, {projection(0, "k"): "not in target_modules=['q_proj', 'v_proj']"}),
    (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2)),
        {"target_modules": "all-linear"},
        {"0": "not in target_modules='all-linear'"},
    ),
    (
        partial(llama, num_hidden_layers=11),
        {"target_modules": ["q_proj"], "exclude_modules": ["10.self_attn.q_proj"], "layers_to_transform": 0},
        {
            projection(0, "k"): "not in target_modules=['q_proj']",
            projection(1): "left out by layers_to_transform=0",
            projection(10): "left out by exclude_modules=['10.self_attn.q_proj']",
        },
    ),
    (
        lists,
        {"target_modules": ["0.0"], "layers_to_transform": [0], "layers_pattern": "blocks"},
        {"out.0.0": "left out by layers_to_transform=[0]"},
    ),
    (
        partial(llama, num_hidden_layers=11),
        {"target_modules": ["q_proj"], "layers_to_transform": list(range(10)), "layers_pattern": "layers"},
        {projection(10): "left out by layers_to_transform=[0, 1, 2, 3, 4, 5, 6, 7] and 2 more"},
    ),
]


@pytest.mark.parametrize(("make", "fields", "expected"), CASES)
def test_reasons(make: Callable[[], Any], fields: dict[str, Any], expected: dict[str, str]) -> None:
    found = reasons(transform(make(), HRAConfig(r=2, **fields)))
    assert {path: found[path] for path in expected} == expected


def test_every_layer_is_either_adapted_or_skipped() -> None:
    model = llama()
    linear = sorted(path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    found = report(transform(model, HRAConfig(r=2, target_modules=["q_proj", "down_proj"])))
    assert sorted([*(row.path for row in found), *reasons(model)]) == linear
    full = report(transform(nn.Sequential(nn.Linear(4, 4)), HRAConfig(r=2, target_modules=["0"])))
    assert full.skipped == ()
    assert "Not adapted" not in str(full)


def test_layers_that_are_trained_in_full_are_not_skipped() -> None:
    """Layers in `modules_to_save`, even if `target_modules` matches them, and a new head."""
    for targets in (["q_proj"], r".*(q_proj|lm_head)"):
        found = report(transform(llama(), HRAConfig(r=2, target_modules=targets, modules_to_save=["lm_head"])))
        assert found.trained_in_full == ("lm_head",)
        assert "lm_head" not in {layer.path for layer in found.skipped}
        assert "Trained in full:\n  lm_head\n" in str(found)
    experts = report(
        transform(built("mixtral"), HRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"]))
    )
    assert not [layer.path for layer in experts.skipped if "experts" in layer.path]
    settings = HRAConfig(r=2, target_modules=["0"])
    model: Any = transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), settings)
    assert [layer.path for layer in report(model).skipped] == ["1"]
    model[1] = nn.Linear(4, 3)
    assert (report(model).trained_in_full, report(model).skipped) == (("1",), ())
    around = nn.Sequential(transform(nn.Sequential(nn.Linear(4, 4)), settings), nn.Linear(4, 2))
    assert report(around).trained_in_full == ("1",)


def test_several_adapters_give_a_reason_each() -> None:
    model = transform(llama(), HRAConfig(r=2, target_modules=["q_proj"]), "a")
    hra_fx.add_adapter(model, "b", HRAConfig(r=2, target_modules=["v_proj"], exclude_modules=["k_proj"]))
    found = reasons(model)
    assert {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}.isdisjoint(found)
    assert found["model.layers.0.self_attn.o_proj"] == (
        "not in target_modules=['q_proj']; not in target_modules=['v_proj']"
    )


def test_layers_around_a_transformed_module_and_parts_of_one() -> None:
    inner = transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), HRAConfig(r=2, target_modules=["0"]))
    assert reasons(nn.Sequential(inner, nn.Linear(4, 2)).requires_grad_(False)) == {
        "0.1": "not in target_modules=['0']",
        "1": "outside of a transformed model, or in a part of one",
    }
    plain = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    whole = transform(plain, HRAConfig(r=2, target_modules=["0.0"]))
    assert reasons(whole[0]) == {"1": "outside of a transformed model, or in a part of one"}


def test_parameters_of_experts_are_listed() -> None:
    found = report(transform(built("mixtral"), HRAConfig(r=2, target_modules="all-linear")))
    assert [(one.path, one.layer_type) for one in found.skipped if "experts" in one.path] == [
        (f"model.layers.{i}.mlp.experts.{name}", f"MixtralExperts {shape}")
        for i in range(2)
        for name, shape in (("gate_up_proj", "4x64x16"), ("down_proj", "4x16x32"))
    ]
    hint = "a 3-D parameter: use target_parameters=['experts.down_proj']"
    assert f"  model.layers.*.mlp.experts.down_proj (2): {hint}\n" in str(found)


def test_a_layer_that_lost_its_adapter_comes_first_under_its_own_heading() -> None:
    model: Any = transform(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2)), HRAConfig(r=2, target_modules=["0", "1"])
    )
    model[1] = nn.Linear(4, 2)
    text = str(report(model))
    lost = "Targeted, but not adapted: 1 layer\n  1: folded or replaced after transform\n"
    assert lost in text
    assert text.index(lost) < text.index("Not adapted: 1 layer\n  2: not in target_modules=['0', '1']\n")
