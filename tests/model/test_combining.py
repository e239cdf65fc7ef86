"""`combine`: one adapter that is the exact product of several, also for PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from model.many import adapted, assert_close, config, ids, llama, net, normal, oracle, product, run, seen
from oracles import dense_product
from torch import nn

import hra_fx
from hra_fx.model.state import sites_of

PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "even ranks": ({"r": 2}, {"r": 4}, 6),
    "anchors": ({"r": 3}, {"r": 1}, 6),
    "Gram-Schmidt": ({"r": 2, "apply_GS": True}, {"r": 3, "apply_GS": True}, 10),
    "Gram-Schmidt without an anchor": ({"r": 2, "apply_GS": True, "init_weights": False}, {"r": 2}, 4),
    "odd plain ranks on the same layers": ({"r": 3, "init_weights": False}, {"r": 1, "init_weights": False}, 4),
}


@pytest.mark.parametrize("fields", PAIRS)
def test_the_new_one_is_the_product(fields: str) -> None:
    left, right, rank = PAIRS[fields]
    plain, model = adapted(net(), a=config("first", "second", **left), b=config("first", "second", **right))
    hra_fx.combine(model, ["b", "a"], "ba")
    assert model.first.hra_u["ba"].shape == (6, rank)
    assert hra_fx.report(model).rows[-1].r == rank
    for layer in sites_of(model).values():
        assert layer.hra_u.anchor("ba") is None
        assert_close(dense_product(layer.hra_u["ba"].detach()), product(layer, ["b", "a"]))
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["a"], x))
    hra_fx.set_adapter(model, "ba")
    assert_close(model(x), oracle(plain, model, ["b", "a"], x))
    assert model.first.hra_u["ba"].requires_grad


def test_layers_of_one_alone_are_filled_with_pairs_that_cancel() -> None:
    plain, model = adapted(net(), a=config("first", "head"), b=config("first", "second", r=3), c=config("second"))
    hra_fx.combine(model, ["c", "a", "b"], "all")
    for path, layer in sites_of(model).items():
        assert layer.hra_u["all"].shape == (layer.in_features, 6), path
        assert bool(layer.hra_u["all"].ne(0).any(dim=0).all()), path
        assert_close(dense_product(layer.hra_u["all"].detach()), product(layer, ["c", "a", "b"]))
    hra_fx.set_adapter(model, "all")
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["c", "a", "b"], x))


def test_the_filling_has_a_gradient() -> None:
    model = adapted(net(), a=config("first", "head"), b=config("first"))[1]
    hra_fx.combine(model, ["a", "b"], "ab")
    hra_fx.set_adapter(model, "ab")
    model(normal(4, 6)).square().sum().backward()
    assert bool(model.head.hra_u["ab"].grad.ne(0).any(dim=0).all())


def test_an_odd_difference_is_refused_with_its_layer() -> None:
    odd = {"r": 3, "init_weights": False}
    model = adapted(net(), a=config("first", "second"), b=config("first", **odd))[1]
    before = seen(model)
    with pytest.raises(hra_fx.AdapterError) as caught:
        hra_fx.combine(model, ["a", "b"], "ab")
    assert str(caught.value) == (
        "second: it has 2 reflections of these adapters, and other layers have 5. The difference must be even, because "
        "it is filled with pairs that cancel. Combine adapters of even ranks."
    )
    assert seen(model) == before


def test_fewer_than_two_and_copies_are_refused() -> None:
    model = adapted(
        net(), a=config("first"), b=config("first", modules_to_save=["head"]), c=config("first", bias="all")
    )
    before = seen(model[1])
    with pytest.raises(hra_fx.AdapterError, match=r"^combine needs at least two adapters, got \['a'\]\.$"):
        hra_fx.combine(model[1], ["a"], "new")
    for name in ("b", "c"):
        with pytest.raises(
            hra_fx.AdapterError, match=rf"^adapter '{name}': it has trained copies of modules or biases"
        ):
            hra_fx.combine(model[1], ["a", name], "new")
    assert seen(model[1]) == before


def test_an_adapter_counts_at_the_strength_that_it_has() -> None:
    plain, model = adapted(net(), a=config("first", "second", r=4), b=config("first", r=3))
    hra_fx.set_scale(model, "a", 0.5)
    hra_fx.set_adapter(model, ["a", "b"])
    x = normal(4, 6)
    wanted = model(x).detach()
    hra_fx.combine(model, ["a", "b"], "mix")
    hra_fx.set_adapter(model, "mix")
    assert_close(model(x), wanted)
    hra_fx.set_scale(model, "a", 0)
    hra_fx.combine(model, ["a", "b"], "rest")
    hra_fx.set_adapter(model, "rest")
    assert_close(model(x), oracle(plain, model, ["b"], x))


def test_the_parts_can_be_deleted_and_the_new_one_trained_on() -> None:
    plain, model = adapted(net(), a=config("first"), b=config("second"))
    x = normal(4, 6)
    wanted = oracle(plain, model, ["a", "b"], x)
    hra_fx.combine(model, ["a", "b"], "ab")
    hra_fx.set_adapter(model, "ab")
    for name in ("a", "b"):
        hra_fx.delete_adapter(model, name)
    assert_close(model(x), wanted)
    hra_fx.fold(model)
    assert_close(model(x), wanted)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("build", ["net", "llama"])
def test_peft_opens_it_with_the_same_outputs(build: str, tmp_path: Path) -> None:
    make, x, first, second = (
        (net, normal(4, 6), ["first", "second"], ["second", "head"])
        if build == "net"
        else (llama, ids(), ["q_proj", "gate_proj"], ["gate_proj", "down_proj"])
    )
    base: nn.Module = make().float()
    x = x.float() if isinstance(x, torch.Tensor) else x
    plain, model = adapted(copy.deepcopy(base), a=config(*first, r=3), b=config(*second, r=2, apply_GS=True))
    hra_fx.combine(model, ["a", "b"], "ab")
    hra_fx.save_adapter(model, tmp_path, "ab")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    hra_fx.set_adapter(model, "ab")
    assert_close(run(theirs, x), run(model, x).detach(), 1e-5)
