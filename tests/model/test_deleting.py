"""`delete_adapter`: what is left is the model without that adapter; with the last one it is the base model again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.many import adapted, assert_close, bert, config, ids, llama, net, normal, oracle, run, seen, sequential
from torch import nn

import hra_fx
from hra_fx.layers.adapted_layer import SiteCarrier
from hra_fx.layers.class_swap import original_class

MODELS: dict[str, tuple[Callable[[], nn.Module], Any, list[str], list[str]]] = {
    "whole": (sequential, normal(4, 6), ["0"], ["0", "3"]),
    "llama": (llama, ids(), ["q_proj", "gate_proj"], ["gate_proj", "down_proj"]),
    "bert": (bert, ids(), ["query", "classifier"], ["value", "query"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_is_as_if_the_deleted_one_had_never_been(name: str) -> None:
    build, x, first, second = MODELS[name]
    plain, model = adapted(build(), a=config(*first), b=config(*second, r=3))
    hra_fx.set_adapter(model, ["b", "a"])
    hra_fx.delete_adapter(model, "b")
    alone = hra_fx.transform(build(), config(*first), "a")
    assert list(model.state_dict()) == list(alone.state_dict())
    assert [original_class(part) for part in model.modules()] == [original_class(part) for part in alone.modules()]
    assert [isinstance(part, SiteCarrier) for part in model.modules()] == [
        isinstance(part, SiteCarrier) for part in alone.modules()
    ]
    assert [row.path for row in hra_fx.report(model)] == [row.path for row in hra_fx.report(alone)]
    assert_close(run(model, x), oracle(plain, model, ["a"], x))


def test_the_only_active_one_gives_way_to_the_first_that_is_left() -> None:
    plain, model = adapted(net(), a=config("first"), b=config("second"), c=config("head"))
    with pytest.warns(hra_fx.HRAWarning, match=r"^adapter 'a' was active and is deleted; 'b' is active now\.$"):
        hra_fx.delete_adapter(model, "a")
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["b"], x))
    assert [key for key, p in model.named_parameters() if p.requires_grad] == ["second.hra_u.b"]


def test_one_of_two_active_ones_leaves_the_other_without_a_warning() -> None:
    plain, model = adapted(net(), a=config("first"), b=config("second"), c=config("head"))
    hra_fx.set_adapter(model, ["c", "b"])
    hra_fx.delete_adapter(model, "c")
    hra_fx.delete_adapter(model, "a")
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["b"], x))


def test_where_none_is_active_none_becomes_active() -> None:
    plain, model = adapted(net(), a=config("first"), b=config("second"))
    hra_fx.set_adapter(model, [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hra_fx.delete_adapter(model, "a")
    assert [str(item.message) for item in caught] == []
    assert torch.equal(model(normal(4, 6)), plain(normal(4, 6)))


def test_the_last_one_leaves_the_base_model() -> None:
    base = net()
    for index, parameter in enumerate(base.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before = seen(base)
    x = normal(4, 6)
    wanted = base(x)
    hra_fx.transform(base, config("first", modules_to_save=["head"], bias="all"), "a")
    hra_fx.add_adapter(base, "b", config("first", "second", r=3))
    hra_fx.delete_adapter(base, "b")
    hra_fx.delete_adapter(base, "a")
    assert seen(base) == before
    assert torch.equal(base(x), wanted)


def test_copies_go_with_their_adapter_and_the_base_models_come_back() -> None:
    plain, model = adapted(net(), a=config("first", modules_to_save=["head"]), b=config("first", bias="hra_only"))
    with pytest.warns(hra_fx.HRAWarning, match="'b' is active now"):
        hra_fx.delete_adapter(model, "a")
    assert torch.equal(model.head.weight, plain.head.weight)
    assert "hra_saved" not in dict(model.head.named_children())
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["b"], x, **{"first.bias": model.first.bias.detach()}))
    assert not torch.equal(model.first.bias, plain.first.bias)


def test_a_deleted_name_can_be_given_again() -> None:
    plain, model = adapted(net(), a=config("first"), b=config("second"))
    hra_fx.delete_adapter(model, "b")
    hra_fx.add_adapter(model, "b", config("head", "first", r=3, init_weights=False))
    hra_fx.set_adapter(model, ["b", "a"])
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["b", "a"], x))


def test_deleting_from_a_merged_model_is_refused() -> None:
    model = adapted(net(), a=config("first"), b=config("second"))[1]
    hra_fx.merge_adapter(model)
    before = seen(model)
    with pytest.raises(hra_fx.AdapterError, match=r"^adapters \['a'\] are merged into the weights\. Call unmerge_ada"):
        hra_fx.delete_adapter(model, "b")
    assert seen(model) == before
