"""add_adapter, set_adapter and delete_adapter: flags, modes, names, order of parameters, wrappers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model.many import adapted, assert_close, config, net, normal, oracle, refuses, run
from oracles import dense_q
from torch import Tensor, nn

import hra_fx


def test_a_model_that_deepspeed_trains_takes_no_other_adapter() -> None:
    """With the attribute that ZeRO-3 sets; the slow tests of DeepSpeed use DeepSpeed itself."""
    model = adapted(net(), a=config("first"))[1]
    model.first.hra_u["a"].ds_id = None
    with refuses(model, r"^first: DeepSpeed already trains it, .* adapter 'b'\. Add it before deepspeed\.initialize"):
        hra_fx.add_adapter(model, "b", config("second"))


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
def test_another_adapter_leaves_the_order_and_the_flags(
    targets: list[str], fields: dict[str, Any], tmp_path: Path
) -> None:
    """`second` has trained copies before it gets reflections, and `first` has reflections first."""
    saved: dict[str, Any] = {"bias": "all", "modules_to_save": ["norm"]}
    model = adapted(net(), a=config("first", **saved), b=config("second"))[1]
    hra_fx.set_adapter(model, "a")

    def seen() -> list[tuple[str, bool]]:
        tensors = [*model.named_parameters(), *model.state_dict(keep_vars=True).items()]
        return [(name, tensor.requires_grad) for name, tensor in tensors]

    before = seen()
    hra_fx.save_adapter(adapted(net(), c=config(*targets, **fields))[1], tmp_path)
    for add in (
        lambda: hra_fx.add_adapter(model, "c", config(*targets, **fields)),
        lambda: hra_fx.load_adapter(model, tmp_path, "c"),
    ):
        add()
        assert [(name, flag) for name, flag in seen() if "c" not in name.split(".")] == before
        hra_fx.delete_adapter(model, "c")
        assert seen() == before


# ---- adapters that are created in inference mode can be trained outside of it ----


def added(model: nn.Module, folder: Path) -> None:
    hra_fx.add_adapter(model, "new", config("second", init_weights=False, modules_to_save=["head"]))


def loaded(model: nn.Module, folder: Path) -> None:
    hra_fx.save_adapter(adapted(net(), a=config("second", r=4, modules_to_save=["head"]))[1], folder)
    hra_fx.load_adapter(model, folder, "new", is_trainable=True)


@pytest.mark.parametrize("make", [added, loaded])
def test_an_adapter_created_in_inference_mode_can_be_trained(
    make: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    """Gradients are those of the dense product."""
    plain, model = adapted(net(), a=config("second"), b=config("second", r=4))
    model.second.train()
    with torch.inference_mode():
        make(model, tmp_path)
        hra_fx.set_adapter(model, "new")
    assert not any(tensor.is_inference() for tensor in model.state_dict(keep_vars=True).values())
    assert model.second.hra_u.training
    x, vectors = normal(3, 6), model.second.hra_u["new"]
    head = {f"head.{key}": getattr(model.head, key).detach() for key in ("weight", "bias")}
    leaf = vectors.detach().clone().requires_grad_()
    new = {"second.weight": plain.second.weight.detach() @ dense_q(leaf), **head}
    torch.func.functional_call(plain, new, (x,)).sum().backward()
    run(model, x).sum().backward()
    assert leaf.grad is not None
    assert_close(vectors.grad, leaf.grad)
    torch.optim.SGD([vectors], lr=0.1).step()
    assert_close(run(model, x), oracle(plain, model, ["new"], x, **head))


def test_a_scale_that_is_set_in_inference_mode_lets_gradients_through() -> None:
    model = adapted(net(), a=config("second"), b=config("first"))[1]
    hra_fx.set_adapter(model, ["a", "b"])
    with torch.inference_mode():
        hra_fx.set_scale(model, "a", 0.5)
    x = normal(3, 6).requires_grad_()
    run(model, x).sum().backward()
    again = x.detach().clone().requires_grad_()
    run(hra_fx.fold(model), again).sum().backward()
    assert_close(x.grad, again.grad)


# ---- the names of adapters ----

POSSIBLE = (
    "`adapter_name` must be a string that can name a parameter and a folder: no dots, slashes or backslashes, no "
    "spaces at its ends, not ending in '_anchor' or '_scaled', and not a reserved name; got {!r}."
)
#: Names that cannot be part of a path or the name of a folder, and names that modules of hra_fx use.
REFUSED = {
    name: POSSIBLE.format(name)
    for name in ("", " a", "a.b", "a/b", "a\\b", "update", "width", "x_anchor", "remove", "add")
}
REFUSED |= {
    "a": "adapter 'a' already exists in this model. Delete it first, or choose another name.",
    3: "`adapter_name` must be a string such as 'default', got 3.",
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_impossible_or_taken_name_is_refused(name: Any) -> None:
    plain, model = adapted(net(), a=config("first"), b=config("first"))
    text = f"^{re.escape(REFUSED[name])}$"
    with refuses(model, text):
        hra_fx.add_adapter(model, name, config("first"))
    if name != "a":
        with refuses(plain, text):
            hra_fx.transform(plain, config("first"), name)


@pytest.mark.parametrize("name", ["set", "promote_to_base"])
def test_a_name_that_copies_use_is_refused(name: str) -> None:
    plain = net()
    with refuses(plain, re.escape(POSSIBLE.format(name))):
        hra_fx.transform(plain, config("first", modules_to_save=["head"]), name)


@pytest.mark.parametrize("name", ["style-2", "été", "a b", "0", "hra_u", "weight"])
def test_a_possible_name_names_parameters_and_copies(name: str) -> None:
    model = adapted(net(), a=config("first", modules_to_save=["head"]))[1]
    hra_fx.add_adapter(model, name, config("first", modules_to_save=["head"]))
    hra_fx.set_adapter(model, name)
    assert f"first.hra_u.{name}" in model.state_dict()
    hra_fx.set_adapter(model, "a")
    assert f"head.hra_saved.{name}.weight" in model.state_dict()
    hra_fx.delete_adapter(model, name)
    assert not any(f"hra_u.{name}" in key or f"hra_saved.{name}." in key for key in model.state_dict())


@pytest.mark.parametrize("use", [hra_fx.set_adapter, hra_fx.merge_adapter, hra_fx.fold])
def test_unknown_and_repeated_names_are_refused(use: Callable[[nn.Module, Any], Any]) -> None:
    model = adapted(net(), a=config("first"), b=config("second"))[1]
    with refuses(model, r"^the model has no adapter 'ab'\. It has 'a', 'b'\.$"):
        use(model, "ab")
    with refuses(model, r"^adapter names must be unique, got \['a', 'b', 'a'\]\.$"):
        use(model, ["a", "b", "a"])


# ---- which adapters act: set_adapter and delete_adapter, also through wrappers ----


class Holder(nn.Module):
    """A wrapper, such as those of training frameworks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * 2


def test_a_wrapper_can_be_given_in_place_of_the_model() -> None:
    plain, model = adapted(net(), a=config("first"))
    wrapper, x = Holder(Holder(model)), normal(4, 6)
    hra_fx.add_adapter(wrapper, "b", config("first", "second", init_weights=False))
    hra_fx.set_adapter(wrapper, ["b", "a"])
    assert_close(wrapper(x), 4 * oracle(plain, model, ["b", "a"], x))
    with hra_fx.disable_adapters(wrapper):
        assert torch.equal(model(x), plain(x))
    hra_fx.merge_adapter(wrapper)
    assert_close(wrapper(x), 4 * oracle(plain, model, ["b", "a"], x))
    hra_fx.unmerge_adapter(wrapper)
    hra_fx.set_scale(wrapper, "b", 0)
    hra_fx.delete_adapter(wrapper, "b")
    assert_close(model(x), oracle(plain, model, ["a"], x))
    hra_fx.fold(wrapper)
    assert type(model) is type(plain)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_what_is_not_one_transformed_model_is_refused() -> None:
    plain, model = adapted(net(), a=config("first"))
    both = nn.ModuleList([model, adapted(net(), a=config("first"))[1]])
    for wrong, text in (
        (both, r"^ModuleList contains several transformed models \('0', '1'\)\. Pass one of them\.$"),
        (model.first, r"^Linear is a submodule of a transformed model\. Pass the model that was transformed\.$"),
        (plain, r"^Net has no adapters\. Call hra_fx\.transform\(model, config\) first\.$"),
        ("net", r"^`model` must be a torch\.nn\.Module, got str\.$"),
    ):
        with refuses(both, text):
            hra_fx.set_adapter(wrong, "a")


# ---- `delete_adapter`: which adapter is active afterwards; with the last one the model is the base model again ----


@pytest.mark.parametrize(("active", "deleted", "left"), [(["a"], "a", ["b"]), (["c", "b"], "ca", ["b"]), ([], "a", [])])
def test_the_first_remaining_adapter_becomes_active_if_the_only_active_one_is_deleted(
    active: list[str], deleted: str, left: list[str]
) -> None:
    plain, model = adapted(net(), a=config("first"), b=config("second"), c=config("head"))
    hra_fx.set_adapter(model, active)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in deleted:
            hra_fx.delete_adapter(model, name)
    text = "adapter 'a' was active and is deleted; 'b' is active now."
    assert [str(warning.message) for warning in caught] == ([text] if active == ["a"] else [])
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, left, x))
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"second.hra_u.{name}" for name in left]


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
