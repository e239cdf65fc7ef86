"""`add_adapter`: flags, modes and the order of parameters do not change; which names an adapter can have."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model.many import F64, adapted, assert_close, config, moved, net, normal, oracle, refuses, run
from oracles import dense_q
from torch import Tensor, nn

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
    with refuses(model, r"^first: DeepSpeed already trains it, .* adapter 'b'\. Add it before deepspeed\.initialize"):
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


# The order of parameters, by which an optimizer's state is saved


@pytest.mark.parametrize(
    ("targets", "fields"),
    [
        (["head", "first"], {}),
        (["first", "second"], {"bias": "hra_only"}),
        (["second"], {"modules_to_save": ["head"]}),
    ],
)
def test_another_adapter_leaves_the_order(targets: list[str], fields: dict[str, Any], tmp_path: Path) -> None:
    """`second` has trained copies before it gets reflections, and `first` the other way round."""
    saved: dict[str, Any] = {"bias": "all", "modules_to_save": ["norm"]}
    model = adapted(net(), a=config("first", **saved), b=config("second"))[1]
    before = [list(dict(model.named_parameters())), list(model.state_dict())]
    hra_fx.save_adapter(adapted(net(), c=config(*targets, **fields))[1], tmp_path)
    for add in (
        lambda: hra_fx.add_adapter(model, "c", config(*targets, **fields)),
        lambda: hra_fx.load_adapter(model, tmp_path, "c"),
    ):
        add()
        after = [list(dict(model.named_parameters())), list(model.state_dict())]
        assert [[name for name in names if "c" not in name.split(".")] for names in after] == before
        hra_fx.delete_adapter(model, "c")
        assert [list(dict(model.named_parameters())), list(model.state_dict())] == before


# ---- what is made in inference mode, also from a file, can be trained outside of it ----


def gradient(plain: nn.Module, vectors: Tensor, x: Tensor) -> Tensor:
    """Of the sum of the outputs of `Net`, by the dense product, by the vectors of its second layer."""
    leaf = vectors.detach().clone().requires_grad_()
    new = {"second.weight": plain.second.weight.detach() @ dense_q(leaf)}
    torch.func.functional_call(plain, new, (x,)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def check_trainable(plain: nn.Module, model: nn.Module, name: str) -> None:
    x = normal(3, 6)
    vectors = model.second.hra_u[name]
    assert not vectors.is_inference()
    assert vectors.requires_grad
    run(model, x).sum().backward()
    assert_close(vectors.grad, gradient(plain, vectors, x))
    torch.optim.SGD([vectors], lr=0.1).step()
    assert_close(run(model, x), oracle(plain, model, [name], x))


@pytest.mark.parametrize("into", ["plain", "beside", "in place"])
def test_what_is_loaded_in_inference_mode_is_trained_on(into: str, tmp_path: Path) -> None:
    plain, other = adapted(net(), a=config("second", r=4))
    hra_fx.save_adapter(other, tmp_path)
    model = net()
    if into != "plain":
        name, target = ("a", "second") if into == "in place" else ("z", "first")
        hra_fx.transform(model, config(target, r=4), name)
    with torch.inference_mode():
        hra_fx.load_adapter(model, tmp_path, "a", is_trainable=True)
        hra_fx.set_adapter(model, "a")
    assert torch.equal(model.second.hra_u["a"], other.second.hra_u["a"])
    check_trainable(plain, model, "a")


def test_copies_that_are_loaded_in_inference_mode_are_trained_on(tmp_path: Path) -> None:
    _, other = adapted(net(), a=config("second", modules_to_save=["head"]))
    hra_fx.save_adapter(other, tmp_path)
    model = net()
    with torch.inference_mode():
        hra_fx.load_adapter(model, tmp_path, "a", is_trainable=True)
    x = normal(3, 6)
    assert not any(tensor.is_inference() for tensor in model.state_dict(keep_vars=True).values())
    assert torch.equal(run(model, x), run(other, x))
    run(model, x).sum().backward()
    hidden = torch.tanh(other.second(torch.tanh(other.norm(other.first(x)))))
    assert_close(model.head.weight.grad, hidden.sum(dim=0).expand(3, 8))


def test_a_product_that_is_made_in_inference_mode_is_trained_on() -> None:
    plain, model = adapted(net(), a=config("second"), b=config("second", r=4))
    x = normal(3, 6)
    wanted = oracle(plain, model, ["a", "b"], x)
    with torch.inference_mode():
        hra_fx.combine(model, ["a", "b"], "c")
        hra_fx.set_adapter(model, "c")
    assert_close(run(model, x), wanted)
    check_trainable(plain, model, "c")


def test_a_scale_that_is_set_in_inference_mode_lets_gradients_through() -> None:
    plain, model = adapted(net(), a=config("second"), b=config("first"))
    hra_fx.set_adapter(model, ["a", "b"])
    with torch.inference_mode():
        hra_fx.set_scale(model, "a", 0.5)
    x = normal(3, 6).requires_grad_()
    run(model, x).sum().backward()
    folded = hra_fx.fold(model)
    again = x.detach().clone().requires_grad_()
    run(folded, again).sum().backward()
    assert_close(x.grad, again.grad)
    half = torch.linalg.solve(plain.second.weight, folded.second.weight.detach())
    assert_close(half @ half.mT, torch.eye(8, dtype=F64))
    assert moved(half, torch.eye(8, dtype=F64))


# ---- the names of adapters ----

#: Names that cannot be part of a path or the name of a folder, and names that modules of hra_fx use.
BAD = ["", " ", " a", "a ", "a.b", "a/b", "a\\b", "a\0b", "keys", "update", "forward", "width", "unmerged", "x_anchor"]
BAD += ["_anchor", "y_scaled", "base_layer", "original_module", "copied", "specs", "active", "remove"]


@pytest.mark.parametrize("name", BAD)
def test_an_impossible_name_is_refused(name: str) -> None:
    model = adapted(net(), a=config("first", modules_to_save=["head"]), b=config("first"), c=config("second"))[1]
    text = (
        "`adapter_name` must be a string that can name a parameter and a folder: no dots, slashes or backslashes, no "
        f"spaces at its ends, not ending in '_anchor' or '_scaled', and not a reserved name; got {name!r}."
    )
    with refuses(model, f"^{re.escape(text)}$"):
        hra_fx.add_adapter(model, name, config("first"))


def test_transform_and_combine_refuse_an_impossible_name() -> None:
    plain, model = adapted(net(), a=config("first"), b=config("first"))
    for given, act in (
        (model, lambda: hra_fx.combine(model, ["a", "b"], "a.b")),
        (plain, lambda: hra_fx.transform(plain, config("first"), "a.b")),
    ):
        with refuses(given, "^`adapter_name` must be a string that can name"):
            act()


@pytest.mark.parametrize("name", ["training", "add"])
def test_a_name_that_every_module_uses_is_refused(name: str) -> None:
    plain, model = adapted(net(), a=config("first"))
    for given, act in (
        (model, lambda: hra_fx.add_adapter(model, name, config("first", "second"))),
        (plain, lambda: hra_fx.transform(plain, config("first"), name)),
    ):
        with refuses(given, rf"^adapter '{name}' already exists\. Choose another name\.$"):
            act()


def test_a_name_that_is_not_a_string_is_refused() -> None:
    model = adapted(net(), a=config("first"))[1]
    with refuses(model, r"^`adapter_name` must be a string such as 'default', got 3\.$"):
        hra_fx.add_adapter(model, 3, config("first"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["style-2", "été", "class", "a b", "0", "default", "hra_u", "_x", "weight", "bias"])
def test_a_possible_name_names_parameters_and_copies(name: str) -> None:
    model = adapted(net(), a=config("first", modules_to_save=["head"]))[1]
    hra_fx.add_adapter(model, name, config("first", modules_to_save=["head"]))
    hra_fx.set_adapter(model, name)
    assert f"first.hra_u.{name}" in model.state_dict()
    hra_fx.set_adapter(model, "a")
    assert f"head.hra_saved.{name}.weight" in model.state_dict()
    hra_fx.delete_adapter(model, name)
    assert not any(f"hra_u.{name}" in key or f"hra_saved.{name}." in key for key in model.state_dict())


def test_a_taken_name_is_refused() -> None:
    model = adapted(net(), a=config("first"), b=config("second"))[1]
    for act in (
        lambda: hra_fx.add_adapter(model, "b", config("second")),
        lambda: hra_fx.combine(model, ["a", "b"], "b"),
    ):
        text = r"^adapter 'b' already exists in this model\. Delete it first, or choose another name\.$"
        with refuses(model, text):
            act()


USES: list[Callable[[nn.Module, Any], Any]] = [hra_fx.set_adapter, hra_fx.merge_adapter, hra_fx.fold]


@pytest.mark.parametrize("use", USES)
def test_unknown_and_repeated_names_are_refused(use: Callable[[nn.Module, Any], Any]) -> None:
    model = adapted(net(), a=config("first"), b=config("second"))[1]
    with refuses(model, r"^the model has no adapter 'ab'\. It has 'a', 'b'\.$"):
        use(model, "ab")
    with refuses(model, r"^adapter names must be unique, got \['a', 'b', 'a'\]\.$"):
        use(model, ["a", "b", "a"])
