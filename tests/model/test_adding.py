"""`add_adapter`: flags, modes and the order of parameters, which optimizer states depend on, do not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model.many import adapted, assert_close, config, net, normal, oracle, refuses, run
from torch import nn

import hra_fx


def test_an_added_adapter_keeps_flags_that_were_set_by_hand() -> None:
    model = adapted(net(), a=config("first", "second", modules_to_save=["norm"]))[1]
    model.first.hra_u["a"].requires_grad_(False)
    model.head.bias.requires_grad_(True)
    with pytest.warns(hra_fx.HRAWarning, match="the scale only affects reflections"):
        hra_fx.set_scale(model, "a", 0.5)
    hra_fx.add_adapter(model, "b", config("head"))
    assert model.norm.weight.requires_grad and model.head.bias.requires_grad
    hra_fx.set_scale(model, "a", 1)
    assert not model.first.hra_u["a"].requires_grad
    assert model.second.hra_u["a"].requires_grad


@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])
def test_a_model_that_deepspeed_trains_takes_no_other_adapter(mark: str) -> None:
    """The marks of ZeRO 1 and 2, and of ZeRO 3; the slow tests of DeepSpeed have models with its own."""
    model = adapted(net(), a=config("first"))[1]
    setattr(model.first.hra_u["a"], mark, None)
    with refuses(model, r"^first: DeepSpeed trains it already, .* adapter 'b'\. Add it before deepspeed\.initialize"):
        hra_fx.add_adapter(model, "b", config("second"))


def test_an_adapter_has_the_mode_of_its_layer_and_can_be_trained_though_added_in_inference_mode() -> None:
    model = adapted(net(), a=config("first"))[1].train()
    model.second.eval()
    with torch.inference_mode():
        hra_fx.add_adapter(model, "b", config("first", "second"))
    assert (model.first.hra_u.training, model.second.hra_u.training) == (True, False)
    hra_fx.set_adapter(model, "b")
    model(normal(4, 6)).sum().backward()
    assert model.second.hra_u["b"].grad is not None


def test_an_adapter_can_be_added_to_a_disabled_model_and_not_to_a_plain_or_merged_one() -> None:
    plain, model = adapted(net(), a=config("first"))
    x = normal(4, 6)
    with hra_fx.disable_adapters(model):
        hra_fx.add_adapter(model, "b", config("second", init_weights=False))
        assert torch.equal(model(x), plain(x))
    assert_close(model(x), oracle(plain, model, ["a"], x))
    with refuses(plain, r"^Net has no adapters\. Call hra_fx\.transform"):
        hra_fx.add_adapter(plain, "b", config("first"))
    hra_fx.merge_adapter(model)
    with refuses(model, r"^adapters \['a'\] are merged into the weights\. Call unmerge_ada"):
        hra_fx.add_adapter(model, "c", config("second"))


# The order of parameters


def order(model: nn.Module, besides: str = "") -> dict[str, list[str]]:
    """Names of children, parameters, buffers and the state, in their order, without those of one adapter."""
    found = {path: list(part._modules) for path, part in model.named_modules()}
    found["parameters"] = [name for name, _ in model.named_parameters()]
    found["buffers"] = [name for name, _ in model.named_buffers()]
    found["state"] = list(model.state_dict())
    if not besides:
        return found
    return {
        path: [name for name in names if besides not in name.split(".")]
        for path, names in found.items()
        if besides not in path.split(".")
    }


def two_in_both_orders() -> tuple[nn.Module, nn.Module]:
    """`second` has trained copies before it gets reflections, and `first` the other way round."""
    saved: dict[str, Any] = {"bias": "all", "modules_to_save": ["norm"]}
    plain, model = adapted(net(), a=config("first", **saved), b=config("second"))
    assert list(model.second._modules) == ["hra_saved", "hra_u"]
    assert list(model.first._modules) == ["hra_u", "hra_saved"]
    return plain, model


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("targets", "fields"),
    [
        (["head", "first"], {}),
        (["first", "second"], {"bias": "hra_only"}),
        (["second"], {"modules_to_save": ["head"]}),
    ],
)
def test_another_adapter_leaves_the_order(
    targets: list[str], fields: dict[str, Any], loaded: bool, tmp_path: Path
) -> None:
    plain, model = two_in_both_orders()
    x = normal(3, 6)
    before, wanted = order(model), run(model, x)
    if loaded:
        hra_fx.save_adapter(adapted(net(), a=config(*targets, **fields))[1], tmp_path)
        hra_fx.load_adapter(model, tmp_path, "c")
    else:
        hra_fx.add_adapter(model, "c", config(*targets, **fields))
    after = order(model, besides="c")
    for path, names in before.items():
        assert [name for name in after[path] if name in names] == names
    for path in ("first", "second"):
        assert after[path] == before[path]
    assert torch.equal(run(model, x), wanted)
    if not fields:
        hra_fx.set_adapter(model, "c")
        assert_close(run(model, x), oracle(plain, model, ["c"], x))
        hra_fx.set_adapter(model, "a")
    hra_fx.delete_adapter(model, "c")
    assert order(model) == before
    assert torch.equal(run(model, x), wanted)
