"""Managing adapters: names, wrappers, the order of parameters, warnings, and what is refused.

`test_any_order.py` compares outputs, weights and gradients after any sequence of steps.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from model.many import SAVED, adapted, assert_close, config, net, normal, oracle, refuses, seen, three, weights
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import hra_fx

X = normal(4, 6)

# ---- adding: the order of parameters, by which an optimizer's state is saved, and what can be trained ----


def test_another_adapter_leaves_the_order_and_the_flags(tmp_path: Path) -> None:
    """`second` has trained copies before it gets reflections, and `first` has reflections first."""
    settings = config("first", "second", bias="hra_only", modules_to_save=["head"])
    saved: dict[str, Any] = {"bias": "all", "modules_to_save": ["norm"]}
    model = adapted(net(), a=config("first", **saved), b=config("second"))[1]
    hra_fx.set_adapter(model, "a")

    def order() -> list[tuple[str, bool]]:
        tensors = [*model.named_parameters(), *model.state_dict(keep_vars=True).items()]
        return [(name, tensor.requires_grad) for name, tensor in tensors]

    before = order()
    hra_fx.save_adapter(adapted(net(), c=settings)[1], tmp_path)
    for add in (
        lambda: hra_fx.add_adapter(model, "c", settings),
        lambda: hra_fx.load_adapter(model, tmp_path, "c"),
    ):
        add()
        assert [(name, flag) for name, flag in order() if "c" not in name.split(".")] == before
        hra_fx.delete_adapter(model, "c")
        assert order() == before


def test_an_adapter_that_is_loaded_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    settings = config("second", init_weights=False, modules_to_save=["head"])
    hra_fx.save_adapter(adapted(net(), a=settings)[1], tmp_path)
    model = adapted(net(), a=config("second"))[1]
    with torch.inference_mode():
        hra_fx.load_adapter(model, tmp_path, "new", is_trainable=True)
        hra_fx.set_adapter(model, "new")
    assert not any(tensor.is_inference() for tensor in model.state_dict(keep_vars=True).values())
    before = model(X).detach()
    model(X).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model(X), before)


def test_a_model_that_deepspeed_trains_takes_no_other_adapter() -> None:
    """With the attribute that ZeRO-3 sets; the slow tests of DeepSpeed use DeepSpeed itself."""
    model = adapted(net(), a=config("first"))[1]
    model.first.hra_u["a"].ds_id = None
    with refuses(
        model,
        r"^first: DeepSpeed already trains its vectors, .* adapter 'b'\. Add adapters before deepspeed\.init",
    ):
        hra_fx.add_adapter(model, "b", config("second"))


# ---- the names of adapters ----

POSSIBLE = (
    "`adapter_name` must be a string that can name a parameter and a folder: no dots, slashes or backslashes, no "
    "spaces at its ends, not ending in '_kept' or '_scaled', and not a reserved name; got {!r}."
)
#: Names that cannot be part of a path or the name of a folder, and names that modules of hra_fx use.
REFUSED = {
    name: POSSIBLE.format(name)
    for name in ("", " a", "a.b", "a/b", "a\\b", "update", "width", "x_kept", "remove", "add", 3)
}
REFUSED |= {
    "a": "adapter 'a' already exists in this model. Delete it, or choose another name.",
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_impossible_or_taken_name_is_refused(name: Any) -> None:
    plain, model = adapted(net(), a=config("first"))
    text = f"^{re.escape(REFUSED[name])}$"
    with refuses(model, text):
        hra_fx.add_adapter(model, name, config("first"))
    if name != "a":
        with refuses(plain, text):
            hra_fx.transform(plain, config("first"), name)


@pytest.mark.parametrize("name", ["style-2", "été", "a b", "0", "hra_u", "weight"])
def test_a_possible_name_names_parameters_and_copies(name: str) -> None:
    model = adapted(net(), a=config("first", modules_to_save=["head"]))[1]
    hra_fx.add_adapter(model, name, config("first", modules_to_save=["head"]))
    assert {f"first.hra_u.{name}", f"head.hra_saved.{name}.weight"} <= model.state_dict().keys()
    hra_fx.delete_adapter(model, name)
    assert not any(f"hra_u.{name}" in key or f"hra_saved.{name}." in key for key in model.state_dict())


# ---- which model is meant ----


class Holder(nn.Module):
    """A wrapper, such as those of training frameworks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * 2


def test_a_wrapper_can_be_given_in_place_of_the_model() -> None:
    plain, model = adapted(net(), a=config("first"))
    wrapper = Holder(Holder(model))
    hra_fx.add_adapter(wrapper, "b", config("first", "second", init_weights=False))
    hra_fx.set_adapter(wrapper, ["b", "a"])
    assert_close(wrapper(X), 4 * oracle(plain, model, ["b", "a"], X))
    with hra_fx.disable_adapters(wrapper):
        assert torch.equal(model(X), plain(X))
    hra_fx.merge_adapter(wrapper)
    assert_close(wrapper(X), 4 * oracle(plain, model, ["b", "a"], X))
    hra_fx.unmerge_adapter(wrapper)
    hra_fx.set_scale(wrapper, "b", 0)
    hra_fx.delete_adapter(wrapper, "b")
    assert_close(model(X), oracle(plain, model, ["a"], X))
    hra_fx.fold(wrapper)
    assert type(model) is type(plain)


def test_what_is_not_one_transformed_model_is_refused() -> None:
    plain, model = adapted(net(), a=config("first"))
    both = nn.ModuleList([model, adapted(net(), a=config("first"))[1]])
    none = r"^Net has no adapters\. Call hra_fx\.transform\(model, config\) first\.$"
    for wrong, text in (
        (both, r"^ModuleList contains several transformed models \('0', '1'\)\. Pass one of them\.$"),
        (model.first, r"^Linear is a submodule of a transformed model\. Pass the model that was transformed\.$"),
        (plain, none),
        ("net", r"^`model` must be a torch\.nn\.Module, got str\.$"),
    ):
        with refuses(both, text):
            hra_fx.set_adapter(wrong, "a")
    for act in (hra_fx.disable_adapters, lambda model: hra_fx.add_adapter(model, "b", config("first"))):
        with refuses(plain, none):
            act(plain)


# ---- what is refused, and what is done with a warning ----


merge = hra_fx.merge_adapter
MERGED = r"^adapters \['a', 'b', 'c'\] are merged into the weights\. Call unmerge_adapter first\.$"
#: What came before (with three active adapters a, b and c), the step, and the error. `test_any_order.py` holds that
#: merged adapters are neither set, scaled, added nor deleted, and that disabled ones are neither merged nor folded.
STEPS: dict[str, tuple[Callable[[Any], object] | None, Callable[[Any], object], str]] = {
    "merge again": (merge, merge, MERGED),
    "reset merged": (merge, lambda model: hra_fx.reset_adapters(model, "a"), MERGED),
    "reset scaled": (
        lambda model: hra_fx.set_scale(model, "a", 0.5),
        lambda model: hra_fx.reset_adapters(model, "a"),
        r"^adapter 'a' must have scale 1\. Call hra_fx\.set_scale",
    ),
    **{
        f"scale {alpha}": (
            None,
            lambda model, alpha=alpha: hra_fx.set_scale(model, "a", alpha),
            rf"^`alpha` must be a number from 0 \(base model\) to 1 \(full adapter\), got {re.escape(repr(alpha))}\.$",
        )
        for alpha in (-0.1, 1.1, float("nan"), True, "half")
    },
    "merge none": (lambda model: hra_fx.set_adapter(model, []), merge, "^no adapter is active, or all are disabled"),
    "set unknown": (
        None,
        lambda model: hra_fx.set_adapter(model, "ab"),
        r"^the model has no adapter 'ab'\. It has 'a', 'b', 'c'\.$",
    ),
    "set twice": (None, lambda model: hra_fx.set_adapter(model, [*"aba"]), "^adapter names must be unique, got .'a'"),
    "delete two": (None, lambda model: hra_fx.delete_adapter(model, [*"ab"]), "^`adapter_name` must be the name"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_is_not_possible_is_refused(step: str) -> None:
    before, act, text = STEPS[step]
    model = three()[1]
    if before:
        before(model)
    with refuses(model, text):
        act(model)


#: What came before, the step, the warning, and the adapters that act afterwards.
WARNINGS: dict[str, tuple[Callable[[Any], object] | None, Callable[[Any], object], str, str]] = {
    "unmerge": (None, hra_fx.unmerge_adapter, r"^no adapter is merged; unmerge_adapter does nothing\.$", "abc"),
    "delete": (
        lambda model: hra_fx.set_adapter(model, "c"),
        lambda model: hra_fx.delete_adapter(model, "c"),
        r"^adapter 'c' was active and is deleted; 'a' is active now\.$",
        "a",
    ),
    "fold": (
        lambda model: hra_fx.set_adapter(model, "b"),
        hra_fx.fold,
        r"^adapters \['a', 'c'\] were not active and are removed\.$",
        "b",
    ),
}


@pytest.mark.parametrize("step", WARNINGS)
def test_a_step_warns(step: str) -> None:
    before, act, text, acting = WARNINGS[step]
    plain, model = three()
    if before:
        before(model)
    wanted, picture = oracle(plain, model, acting, X), seen(model)
    with pytest.warns(hra_fx.HRAWarning, match=text) as caught:
        act(model)
    assert [warning.filename for warning in caught] == [__file__]
    assert_close(model(X), wanted)
    assert step != "unmerge" or seen(model) == picture


def test_a_fold_of_merged_adapters_starts_from_the_weights_before() -> None:
    plain, model = three(torch.bfloat16)
    wanted = weights(plain, model, ["a", "b", "c"])
    hra_fx.merge_adapter(model)
    hra_fx.fold(model)
    for key, weight in wanted.items():
        assert torch.equal(model.get_parameter(key), weight.bfloat16())


# ---- `disable_adapters` ----


def test_blocks_that_overlap_in_threads() -> None:
    """The adapters are off from the first block that opens to the last one that closes, also in 16 bits."""
    plain, model = (each.to(torch.bfloat16) for each in adapted(net(), a=config("first", **SAVED)))
    x = X.bfloat16()
    on, off, second = model(x), plain(x), hra_fx.disable_adapters(model)
    with ThreadPoolExecutor(1) as other:
        with hra_fx.disable_adapters(model):
            other.submit(second.__enter__).result()
            assert torch.equal(model(x), off)
        assert torch.equal(model(x), off)
        other.submit(second.__exit__, None, None, None).result()
    assert torch.equal(model(x), on)


@pytest.mark.parametrize("way", [copy.deepcopy, AveragedModel, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_that_is_made_in_a_block_has_no_open_block(way: Any) -> None:
    plain, model = adapted(net(), a=config("first", **SAVED), b=config("first"))
    with hra_fx.disable_adapters(model):
        made = way(model)
    made = getattr(made, "module", made)
    assert torch.equal(made(X), plain(X)), "disabled, as the model was"
    for name in ("b", "a"):
        for each in (made, model):
            hra_fx.set_adapter(each, name)
        assert torch.equal(made(X), model(X)) and not torch.equal(made(X), plain(X))


# ---- training that would change no adapter ----

STOPS: dict[str, tuple[Callable[[Any], object], Callable[[Any], object], str]] = {
    "merged": (hra_fx.merge_adapter, hra_fx.unmerge_adapter, r"merged into .*unmerge_adapter\(model\) first"),
    "disabled": (hra_fx.disable_adapters, lambda model: hra_fx.set_adapter(model, "a"), r"disabled .*'a'\]\) first"),
    "scaled": (
        lambda model: hra_fx.set_scale(model, "a", 0.5),
        lambda model: hra_fx.set_scale(model, "a", 1),
        r"scale is not 1\. Call hra_fx\.set_scale\(model, 'a', 1\) first",
    ),
}


@pytest.mark.parametrize("saved", [{}, SAVED])
@pytest.mark.parametrize("state", STOPS)
def test_a_backward_pass_that_trains_no_adapter(state: str, saved: dict[str, Any]) -> None:
    """It raises an error, unless the adapters act again. Outputs are the same, and inputs have their gradients."""
    stop, start, text = STOPS[state]
    model = adapted(net(), a=config("first", **saved))[1]
    stop(model)
    with torch.no_grad():
        wanted = model(X)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    if not saved:
        model(x).sum().backward()
        assert torch.equal(x.grad, gradient)  # type: ignore[arg-type]
    model.training = True  # only of the root, because its BatchNorm would compute something else
    output = model(X)
    assert torch.equal(output, wanted)
    with refuses(model, text):
        output.sum().backward(retain_graph=True)
    start(model)
    (output + model(X)).sum().backward()
    assert (model.first.hra_u["a"].grad != 0).any()


def test_a_layer_that_was_replaced_is_noticed_before_the_training() -> None:
    plain, model = adapted(net(), a=config("first", "second"))
    model.second, model.training = plain.second, True
    with refuses(model, r"^adapter 'a': second does not match .* Replace parts before transform"):
        model.train()
    model.eval()(X)
