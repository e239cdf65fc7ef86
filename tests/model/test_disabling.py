"""`disable_adapters`: the base model bit for bit inside the block, and everything as it was after it."""

from __future__ import annotations

import pytest
import torch
from model.many import SAVED, adapted, assert_close, config, moved, net, normal, oracle, refuses, seen, stored
from torch import nn

import hra_fx
from hra_fx.model.state import get_state


def four() -> tuple[nn.Module, nn.Module]:
    return adapted(net(), a=config("first", "second", **SAVED), b=config("first", r=3), c=config("second"))


def test_the_base_model_acts_inside_nested_blocks_and_an_exception_restores_everything() -> None:
    plain, model = four()
    hra_fx.set_adapter(model, ["b", "a"])
    text = r"^adapter 'a': the scale only affects reflections, not trained modules and biases\.$"
    with pytest.warns(hra_fx.HRAWarning, match=text):
        hra_fx.set_scale(model, "a", 0.5)
    x, before = normal(4, 6), seen(model)
    wanted = model(x)
    assert moved(wanted, plain(x))
    with pytest.raises(ZeroDivisionError), hra_fx.disable_adapters(model):
        with hra_fx.disable_adapters(model):
            assert torch.equal(model(x), plain(x))
        assert torch.equal(model(x), plain(x))
        _ = 1 / 0
    assert torch.equal(model(x), wanted)
    assert seen(model) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("merged", [["b"], ["b", "a"]])
def test_merged_adapters_are_unmerged_inside_and_merged_again_after(merged: list[str], dtype: torch.dtype) -> None:
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
    assert (get_state(model).active, get_state(model).merged) == (("b", "a"), tuple(merged))


def test_the_buffers_of_a_saved_norm_are_not_updated_inside() -> None:
    plain, model = four()
    plain.train(), model.train()
    waiting = model.norm.running_mean
    kept, x = waiting.clone(), normal(4, 6)
    with hra_fx.disable_adapters(model):
        assert torch.equal(model(x), plain(x))
        assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
    assert model.norm.running_mean is waiting
    assert torch.equal(waiting, kept)


@pytest.mark.parametrize("saved", [{}, {"modules_to_save": ["head"]}], ids=["vectors", "copies"])
@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_that_is_set_inside_is_active_afterwards(merged: bool, saved: dict[str, list[str]]) -> None:
    plain, model = adapted(net(), a=config("first", "second", **saved), b=config("second", **saved), c=config("first"))
    x = normal(4, 6)
    hra_fx.set_adapter(model, "b")
    head = {f"head.{key}": getattr(model.head, key).detach() for key in ("weight", "bias")}
    wanted = oracle(plain, model, ["b"], x, **head)
    hra_fx.set_adapter(model, "a")
    if merged:
        hra_fx.merge_adapter(model)
    with hra_fx.disable_adapters(model):
        hra_fx.set_adapter(model, "b")
        hra_fx.delete_adapter(model, "c")
        assert torch.equal(model(x), plain(x))
    record = get_state(model)
    assert (record.active, record.merged, record.disabled) == (("b",), (), False)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained == ["second.hra_u.b", *head] if saved else ["second.hra_u.b"]
    assert_close(model(x), wanted)
    for name in ("first.weight", "second.weight"):
        assert torch.equal(stored(model, name), plain.get_parameter(name))


def test_merging_and_folding_inside_and_a_plain_model_are_refused() -> None:
    model = four()[1]
    text = r"^adapters are disabled\. Leave the disable_adapters block, or call set_adapter or enable_adapter_layers"
    with hra_fx.disable_adapters(model):
        for act in (hra_fx.merge_adapter, hra_fx.fold):
            with refuses(model, text):
                act(model)
    with pytest.raises(hra_fx.AdapterError, match=r"^Net has no adapters\. Call hra_fx\.transform"):
        hra_fx.disable_adapters(net())


# Without `with`


def test_a_plain_call_disables_until_set_adapter_and_a_block_after_it_changes_nothing() -> None:
    plain, model = four()
    x, wanted = normal(4, 6), model(normal(4, 6))
    hra_fx.disable_adapters(model)
    assert torch.equal(model(x), plain(x))
    with hra_fx.disable_adapters(model):
        pass
    assert torch.equal(model(x), plain(x))
    hra_fx.set_adapter(model, "a")
    assert torch.equal(model(x), wanted)


def test_methods_keep_them_disabled_until_they_are_enabled_as_in_peft() -> None:
    plain, model = four()
    model = hra_fx.HRAModel(model, config("first", "second", **SAVED), "a")
    x, wanted = normal(4, 6), model(normal(4, 6))
    model.disable_adapter_layers()
    model.set_adapter("a")
    assert torch.equal(model(x), plain(x))
    with model.disable_adapter():
        pass
    assert torch.equal(model(x), plain(x))
    model.enable_adapter_layers()
    assert torch.equal(model(x), wanted)


def test_a_decorator_disables_during_each_call_and_restores_at_once() -> None:
    plain, model = four()
    hra_fx.set_adapter(model, ["b", "a"])
    x = normal(4, 6)
    wanted = model(x)

    @hra_fx.disable_adapters(model)
    def base(value: torch.Tensor, *, fail: bool = False) -> torch.Tensor:
        """The base model."""
        if fail:
            raise ZeroDivisionError
        result: torch.Tensor = model(value)
        return result

    assert (base.__name__, base.__doc__) == ("base", "The base model.")
    assert torch.equal(model(x), wanted)
    for _ in range(2):
        assert torch.equal(base(x), plain(x))
        assert torch.equal(model(x), wanted)
    with pytest.raises(ZeroDivisionError):
        base(x, fail=True)
    assert torch.equal(model(x), wanted)
