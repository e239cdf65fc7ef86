"""`disable_adapters`: the base model bit for bit inside the block, and everything as it was after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model.many import adapted, bert, config, ids, llama, moved, net, normal, run, seen
from torch import nn

import hra_fx

SAVED: dict[str, Any] = {"modules_to_save": ["head", "norm"], "bias": "all"}


def four() -> tuple[nn.Module, nn.Module]:
    return adapted(net(), a=config("first", "second", **SAVED), b=config("first", r=3), c=config("second"))


def test_the_base_model_is_there_bit_for_bit() -> None:
    plain, model = four()
    hra_fx.set_adapter(model, ["b", "a"])
    x, before = normal(4, 6), seen(model)
    wanted = model(x)
    assert moved(wanted, plain(x))
    with hra_fx.disable_adapters(model):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), wanted)
    assert seen(model) == before


@pytest.mark.parametrize("build", [llama, bert])
def test_the_base_model_of_transformers_is_there_bit_for_bit(build: Any) -> None:
    targets = ["q_proj", "gate_proj"] if build is llama else ["query", "pooler.dense"]
    plain, model = adapted(build(), a=config(*targets, bias="all"), b=config(*targets, r=3))
    hra_fx.set_adapter(model, ["a", "b"])
    with hra_fx.disable_adapters(model):
        assert torch.equal(run(model, ids()), run(plain, ids()))
    assert moved(run(model, ids()), run(plain, ids()))


def test_blocks_can_be_nested() -> None:
    plain, model = four()
    x, before = normal(4, 6), seen(model)
    with hra_fx.disable_adapters(model):
        with hra_fx.disable_adapters(model):
            assert torch.equal(model(x), plain(x))
        assert torch.equal(model(x), plain(x))
    assert seen(model) == before


def test_an_exception_inside_restores_everything_too() -> None:
    plain, model = four()
    before = seen(model)
    with (
        pytest.raises(ZeroDivisionError),
        hra_fx.disable_adapters(model),
        hra_fx.disable_adapters(model),
    ):
        _ = 1 / 0
    assert seen(model) == before
    assert moved(model(normal(4, 6)), plain(normal(4, 6)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", [["b"], ["b", "a"]])
def test_merged_adapters_are_out_inside_and_in_again_after(merged: list[str], dtype: torch.dtype) -> None:
    plain, model = four()
    plain.to(dtype), model.to(dtype)
    hra_fx.set_adapter(model, ["b", "a"])
    hra_fx.merge_adapter(model, merged)
    x = normal(4, 6).to(dtype)
    before, wanted = {key: value.clone() for key, value in model.state_dict().items()}, model(x)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), hra_fx.disable_adapters(model):
            assert torch.equal(model(x), plain(x))
            with hra_fx.disable_adapters(model):
                assert torch.equal(model(x), plain(x))
            _ = 1 / 0
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert torch.equal(model(x), wanted)


def test_the_base_of_a_scaled_model_is_there_and_its_strength_after() -> None:
    plain, model = four()
    with pytest.warns(
        hra_fx.HRAWarning, match=r"^adapter 'a': its strength affects reflections only, not trained modules and"
    ):
        hra_fx.set_scale(model, "a", 0.5)
    x = normal(4, 6)
    wanted = model(x)
    with hra_fx.disable_adapters(model):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), wanted)


def test_the_buffers_of_a_saved_norm_stay_out_of_reach() -> None:
    plain, model = four()
    plain.train(), model.train()
    waiting = model.norm.running_mean
    kept, x = waiting.clone(), normal(4, 6)
    with hra_fx.disable_adapters(model):
        assert torch.equal(model(x), plain(x))
        assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
    assert model.norm.running_mean is waiting
    assert torch.equal(waiting, kept)


def test_adapters_can_be_switched_and_deleted_inside() -> None:
    plain, model = four()
    x = normal(4, 6)
    with hra_fx.disable_adapters(model):
        hra_fx.set_adapter(model, "b")
        hra_fx.delete_adapter(model, "c")
        assert torch.equal(model(x), plain(x))
    assert model.first.hra_u.active == ("b",)
    assert moved(model(x), plain(x))


def test_a_merged_adapter_can_be_deleted_inside() -> None:
    """It is unmerged there; what cannot be merged again after the block stays out."""
    plain, model = adapted(net(), a=config("first"), b=config("second"))
    hra_fx.merge_adapter(model)
    with hra_fx.disable_adapters(model), pytest.warns(hra_fx.HRAWarning, match="'b' is active now"):
        hra_fx.delete_adapter(model, "a")
    hra_fx.set_adapter(model, [])
    assert torch.equal(model(normal(4, 6)), plain(normal(4, 6)))
    assert not any("unmerged" in key for key in model.state_dict())


def test_the_last_adapter_can_be_deleted_inside() -> None:
    plain, model = adapted(net(), a=config("first", modules_to_save=["head"]))
    with hra_fx.disable_adapters(model):
        hra_fx.delete_adapter(model, "a")
    assert type(model) is type(plain)
    assert torch.equal(model(normal(4, 6)), plain(normal(4, 6)))


def test_merging_and_folding_inside_are_refused() -> None:
    model = four()[1]
    text = r"^adapters are disabled\. Leave the disable_adapters block, or call set_adapter or enable_adapter_layers"
    with hra_fx.disable_adapters(model):
        for act in (hra_fx.merge_adapter, hra_fx.fold):
            with pytest.raises(hra_fx.AdapterError, match=text):
                act(model)


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(hra_fx.AdapterError, match=r"^Net: it has no reflections\."):
        hra_fx.disable_adapters(net())


# Without `with`


def test_it_acts_when_it_is_called_and_set_adapter_enables() -> None:
    plain, model = four()
    x, wanted = normal(4, 6), model(normal(4, 6))
    hra_fx.disable_adapters(model)
    assert torch.equal(model(x), plain(x))
    hra_fx.set_adapter(model, "a")
    assert torch.equal(model(x), wanted)


def test_an_object_made_before_its_block_restores_what_was_there_before_it() -> None:
    plain, model = four()
    hra_fx.merge_adapter(model)
    x, before = normal(4, 6), model(normal(4, 6))
    off = hra_fx.disable_adapters(model)
    assert torch.equal(model(x), plain(x))
    with off:
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), before)
    assert hra_fx.HRAModel(model, config("first", "second", **SAVED), "a").peft_config.keys() == {"a", "b", "c"}


def test_a_block_after_a_plain_call_leaves_the_adapters_disabled() -> None:
    plain, model = four()
    hra_fx.disable_adapters(model)
    with hra_fx.disable_adapters(model):
        pass
    assert torch.equal(model(normal(4, 6)), plain(normal(4, 6)))


@pytest.mark.parametrize("names", ["adapter_layers", "adapters"])
def test_methods_keep_them_disabled_until_they_are_enabled_as_in_peft(names: str) -> None:
    plain, model = four()
    model = hra_fx.HRAModel(model, config("first", "second", **SAVED), "a")
    x, wanted = normal(4, 6), model(normal(4, 6))
    getattr(model, f"disable_{names}")()
    model.set_adapter("a")
    assert torch.equal(model(x), plain(x))
    with model.disable_adapter():
        pass
    assert torch.equal(model(x), plain(x))
    getattr(model, f"enable_{names}")()
    assert torch.equal(model(x), wanted)
