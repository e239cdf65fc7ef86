"""`combine`: one adapter that is the exact product of several, also for PEFT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from model.many import (
    F64,
    PAIRS,
    adapted,
    assert_close,
    config,
    ids,
    llama,
    moved,
    net,
    normal,
    oracle,
    product,
    refuses,
    run,
)
from oracles import dense_product
from torch import Tensor, nn

import hra_fx
from hra_fx.model.state import adapted_layers


@pytest.mark.parametrize("fields", PAIRS)
def test_the_new_one_is_the_product(fields: str) -> None:
    left, right, rank = PAIRS[fields]
    plain, model = adapted(net(), a=config("first", "second", **left), b=config("first", "second", **right))
    hra_fx.combine(model, ["b", "a"], "ba")
    assert model.first.hra_u["ba"].shape == (6, rank)
    assert hra_fx.report(model).rows[-1].r == rank
    for layer in adapted_layers(model).values():
        assert layer.hra_u.anchor("ba") is None
        assert_close(dense_product(layer.hra_u["ba"].detach()), product(layer, ["b", "a"]))
    x = normal(4, 6)
    for active, factors in ((["a"], ["a"]), (["b", "a"], ["b", "a"]), (["a", "b"], ["a", "b"]), (["ba"], ["b", "a"])):
        hra_fx.set_adapter(model, active)
        assert_close(model(x), oracle(plain, model, factors, x))
    assert model.first.hra_u["ba"].requires_grad


def test_layers_of_one_alone_are_filled_with_pairs_that_cancel() -> None:
    plain, model = adapted(net(), a=config("first", "head"), b=config("first", "second", r=3), c=config("second"))
    hra_fx.combine(model, ["c", "a", "b"], "all")
    for path, layer in adapted_layers(model).items():
        assert layer.hra_u["all"].shape == (layer.in_features, 6), path
        assert bool(layer.hra_u["all"].ne(0).any(dim=0).all()), path
        assert_close(dense_product(layer.hra_u["all"].detach()), product(layer, ["c", "a", "b"]))
    hra_fx.set_adapter(model, "all")
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["c", "a", "b"], x))
    model(x).square().sum().backward()
    assert all(bool(layer.hra_u["all"].grad.ne(0).any(dim=0).all()) for layer in adapted_layers(model).values())


def test_an_odd_difference_is_refused_with_its_layer() -> None:
    odd = {"r": 3, "init_weights": False}
    model = adapted(net(), a=config("first", "second"), b=config("first", **odd))[1]
    text = (
        "second: it has 2 reflections of these adapters, but other layers have 5. The difference must be even, because "
        "layers are padded with pairs that cancel. Combine adapters of even ranks."
    )
    with refuses(model, f"^{re.escape(text)}$"):
        hra_fx.combine(model, ["a", "b"], "ab")


def test_fewer_than_two_and_copies_and_only_scales_of_zero_are_refused() -> None:
    _, model = adapted(
        net(),
        a=config("first", "second"),
        b=config("second"),
        c=config("first", modules_to_save=["head"]),
        d=config("first", bias="all"),
    )
    with refuses(model, r"^combine needs at least two adapters, got \['a'\]\.$"):
        hra_fx.combine(model, ["a"], "new")
    for name in ("c", "d"):
        with refuses(model, rf"^adapter '{name}': it has trained copies of modules or biases"):
            hra_fx.combine(model, ["a", name], "new")
    for name in ("a", "b"):
        hra_fx.set_scale(model, name, 0)
    text = r"^adapters \['a', 'b'\]: all have scale 0, so their product is the identity\. Call hra_fx\.set_scale\.$"
    with refuses(model, text):
        hra_fx.combine(model, ["a", "b"], "new")


def test_an_adapter_counts_at_the_scale_that_it_has() -> None:
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


class Alike(nn.Module):
    """Paths that end alike, and a dot that as a pattern would name another layer (`0.1` and `041`)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.fcx = nn.Linear(6, 6), nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"fc": nn.Linear(6, 6)})
        self.add_module("0", nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
        self.add_module("041", nn.Linear(6, 6))
        self.to(F64).eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.fcx(self.inner["fc"](torch.tanh(self.fc(x))))
        return self.get_submodule("041")(self.get_submodule("0")(x))


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"target_modules": ["fc"]}, ["fc", "inner.fc"]),
        ({"target_modules": "fc"}, ["fc"]),
        ({"target_modules": ["0.1"]}, ["0.1"]),
    ],
)
def test_the_product_is_on_exactly_the_layers_of_its_parts_also_in_a_file(
    fields: dict[str, Any], layers: list[str], tmp_path: Path
) -> None:
    def layers_of(model: nn.Module, name: str) -> list[str]:
        return [path for path, layer in adapted_layers(model).items() if name in layer.hra_u]

    plain, model = adapted(Alike(), a=config(**fields), b=config(**fields), z=config("041", "fcx"))
    x = normal(3, 6)
    hra_fx.combine(model, ["a", "b"], "c")
    assert layers_of(model, "c") == layers
    hra_fx.set_adapter(model, ["c", "z"])
    assert_close(run(model, x), oracle(plain, model, ["a", "b", "z"], x))
    hra_fx.set_adapter(model, "c")
    assert moved(run(model, x), run(plain, x))
    hra_fx.save_adapter(model, tmp_path, "c")
    again = hra_fx.load_adapter(Alike(), tmp_path)
    assert layers_of(again, "default") == layers
    assert_close(run(again, x), run(model, x), 1e-14)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_opens_it_with_the_same_outputs(tmp_path: Path) -> None:
    left, right = config("q_proj", "gate_proj", r=3), config("gate_proj", "down_proj", r=2, apply_GS=True)
    plain, model = adapted(llama().float(), a=left, b=right)
    hra_fx.combine(model, ["a", "b"], "ab")
    hra_fx.save_adapter(model, tmp_path, "ab")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    hra_fx.set_adapter(model, "ab")
    assert_close(run(theirs, ids()), run(model, ids()).detach(), 1e-5)
