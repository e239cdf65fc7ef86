"""`delete_adapter`: which adapter is active afterwards; with the last one the model is the base model again."""

from __future__ import annotations

import warnings

import pytest
import torch
from model.many import SAVED, adapted, assert_close, config, net, normal, oracle, refuses, seen

import hra_fx


def test_if_the_only_active_adapter_is_deleted_the_first_remaining_one_becomes_active() -> None:
    plain, model = adapted(net(), a=config("first"), b=config("second"), c=config("head"))
    with pytest.warns(hra_fx.HRAWarning, match=r"^adapter 'a' was active and is deleted; 'b' is active now\.$"):
        hra_fx.delete_adapter(model, "a")
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["b"], x))
    assert [key for key, p in model.named_parameters() if p.requires_grad] == ["second.hra_u.b"]


@pytest.mark.parametrize(("active", "deleted", "left"), [(["c", "b"], "ca", ["b"]), ([], "a", [])])
def test_otherwise_no_adapter_becomes_active_and_nothing_is_warned_of(
    active: list[str], deleted: str, left: list[str]
) -> None:
    plain, model = adapted(net(), a=config("first"), b=config("second"), c=config("head"))
    hra_fx.set_adapter(model, active)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in deleted:
            hra_fx.delete_adapter(model, name)
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, left, x))


def test_the_last_one_leaves_the_base_model() -> None:
    base = net()
    for index, parameter in enumerate(base.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before, x = seen(base), normal(4, 6)
    wanted = base(x)
    hra_fx.transform(base, config("first", **SAVED), "a")
    hra_fx.add_adapter(base, "b", config("first", "second", r=3))
    hra_fx.delete_adapter(base, "b")
    hra_fx.delete_adapter(base, "a")
    assert seen(base) == before
    assert torch.equal(base(x), wanted)


def test_copies_are_deleted_with_their_adapter_and_its_name_can_be_used_again() -> None:
    plain, model = adapted(net(), a=config("first", modules_to_save=["head"]), b=config("first", bias="hra_only"))
    with pytest.warns(hra_fx.HRAWarning, match="'b' is active now"):
        hra_fx.delete_adapter(model, "a")
    assert torch.equal(model.head.weight, plain.head.weight)
    assert "hra_saved" not in dict(model.head.named_children())
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["b"], x, **{"first.bias": model.first.bias.detach()}))
    assert not torch.equal(model.first.bias, plain.first.bias)
    hra_fx.add_adapter(model, "a", config("head", r=3, init_weights=False))
    hra_fx.set_adapter(model, "a")
    assert_close(model(x), oracle(plain, model, ["a"], x))


def test_deleting_from_a_merged_model_is_refused() -> None:
    model = adapted(net(), a=config("first"), b=config("second"))[1]
    hra_fx.merge_adapter(model)
    with refuses(model, r"^adapters \['a'\] are merged into the weights\. Call unmerge_ada"):
        hra_fx.delete_adapter(model, "b")
