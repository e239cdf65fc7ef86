"""Classes that are not ours alone: what another tool puts over them, what is compiled, and new objects of them."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model.many import F64, adapted, assert_close, config, normal, oracle, product, run, seen, turn
from torch import Tensor, nn
from torch.nn.utils import parametrize

import hra_fx
from hra_fx.model.state import record_of


class Twice(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


class Scaled(nn.Module):
    """A region root with a parameter of its own: `(n, 6) -> (n, 6)`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x) * self.scale))


def scaled(*, as_peft: bool = False, **configs: hra_fx.HRAConfig) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain, model = adapted(Scaled().to(F64).eval(), **configs)
    return plain, hra_fx.HRAModel(model, next(iter(configs.values())), next(iter(configs))) if as_peft else model


STEPS: dict[str, tuple[type[Exception], Callable[[Any], object]]] = {
    "delete": (hra_fx.AdapterError, lambda model: hra_fx.delete_adapter(model, "x")),
    "add": (hra_fx.AdapterError, lambda model: hra_fx.add_adapter(model, "z", config("c"))),
    "fold": (hra_fx.FoldError, lambda model: hra_fx.fold(model)),
    "fold one": (hra_fx.FoldError, lambda model: hra_fx.fold(model, "x")),
    "merge": (hra_fx.FoldError, lambda model: hra_fx.merge_adapter(model)),
    "unload": (hra_fx.AdapterError, lambda model: model.unload()),
    "merge and unload": (hra_fx.FoldError, lambda model: model.merge_and_unload()),
}
PLACES = {"a": ("a", "weight", "ParametrizedLinear"), "the model": ("", "scale", "ParametrizedScaled")}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("place", PLACES)
def test_a_class_over_ours_is_named_and_nothing_happens(place: str, step: str) -> None:
    plain, model = scaled(as_peft="unload" in step, x=config("a", "b"), y=config("b"))
    path, attribute, made = PLACES[place]
    x = normal(3, 6)
    parametrize.register_parametrization(model.get_submodule(path), attribute, Twice())
    parametrize.register_parametrization(plain.get_submodule(path), attribute, Twice())
    wanted = {
        "b.weight": plain.b.weight.double() @ product(model.b, ["x"]),
        "a.parametrizations.weight.original" if path else "a.weight": (
            plain.a.parametrizations.weight.original if path else plain.a.weight
        )
        @ product(model.a, ["x"]),
    }
    expected = torch.func.functional_call(plain, wanted, (x,))
    before, output = seen(model), run(model, x)
    assert_close(output, expected)
    kind, act = STEPS[step]
    if (place, step) == ("the model", "merge"):  # which needs the classes of layers only
        act(model)
        assert_close(run(model, x), output)
        return
    text = rf"^{place}: another tool replaced its class \({made}\)\. Undo that first"
    with pytest.raises(kind, match=text):
        act(model)
    assert seen(model) == before
    assert torch.equal(run(model, x), output)


@pytest.mark.parametrize("place", PLACES)
def test_once_it_is_off_all_works_again(place: str) -> None:
    plain, model = scaled(x=config("a", "b"), y=config("b"))
    path, attribute, _ = PLACES[place]
    x = normal(3, 6)
    wanted = oracle(plain, model, ["y"], x)
    parametrize.register_parametrization(model.get_submodule(path), attribute, Twice())
    parametrize.remove_parametrizations(model.get_submodule(path), attribute, leave_parametrized=False)
    with pytest.warns(hra_fx.HRAWarning, match="'y' is active now"):
        hra_fx.delete_adapter(model, "x")
    assert_close(run(model, x), wanted)
    hra_fx.fold(model)
    assert_close(run(model, x), wanted)
    assert [type(part) for part in model.modules()] == [type(part) for part in plain.modules()]


def test_one_over_a_layer_without_reflections_is_in_nobodys_way() -> None:
    plain, model = scaled(x=config("a"), y=config("b"))
    x = normal(3, 6)
    for each in (plain, model):
        parametrize.register_parametrization(each.c, "weight", Twice())
    hra_fx.set_adapter(model, ["x", "y"])
    wanted, one = oracle(plain, model, ["x", "y"], x), oracle(plain, model, ["y"], x)
    assert_close(run(model, x), wanted)
    hra_fx.delete_adapter(model, "x")
    assert_close(run(model, x), one)
    assert_close(run(hra_fx.fold(model), x), one)
    assert type(model.c).__name__ == "ParametrizedLinear"


# Scripted children


def scripted(layer: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(layer)


def with_scripted() -> tuple[nn.Sequential, nn.Sequential, Callable[..., Tensor]]:
    """A model with a scripted head, the same one unscripted, and an oracle for weights of its two first layers."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)).to(F64).eval()
    model = nn.Sequential(*copy.deepcopy(plain)[:3], scripted(copy.deepcopy(plain[3])))

    def wanted(names: list[str], x: Tensor) -> Tensor:
        new = {f"{i}.weight": plain[i].weight.detach() @ q for i, q in chains(names).items()}
        return torch.func.functional_call(plain, new, (x,))

    def chains(names: list[str]) -> dict[int, Tensor]:
        return {i: product(model[i], names) for i in (0, 2) if hasattr(model[i], "hra_u")}

    return model, plain, wanted


def test_a_scripted_child_is_in_nobodys_way(tmp_path: Path) -> None:
    model, plain, wanted = with_scripted()
    x = normal(4, 6)
    keys = list(model.state_dict())
    hra_fx.transform(model, config("0"), "a")
    hra_fx.add_adapter(model, "b", config("0", "2"))
    turn(model)
    hra_fx.save_adapter(model, tmp_path, "b")
    for names in (["a"], ["b"], ["b", "a"], ["a", "b"]):
        hra_fx.set_adapter(model, names)
        assert_close(run(model, x), wanted(names, x))
    both, last = wanted(["a", "b"], x), wanted(["b"], x)
    assert [row.path for row in hra_fx.report(model).rows] == ["0", "0", "2"]
    hra_fx.merge_adapter(model)
    assert_close(run(model, x), both)
    hra_fx.unmerge_adapter(model)
    hra_fx.delete_adapter(model, "a")
    assert_close(run(model, x), last)
    hra_fx.fold(model)
    assert_close(run(model, x), last)
    assert list(model.state_dict()) == keys
    assert not any(hasattr(part, "hra_u") for part in model)
    again, _, _ = with_scripted()
    hra_fx.load_adapter(again, tmp_path, "b")
    assert_close(run(again, x), last)
    hra_fx.delete_adapter(again, "b")
    assert torch.equal(run(again, x), run(plain, x))
    assert record_of(again) is None


@pytest.mark.parametrize("end", ["fold", "delete", "part"])
def test_the_smallest_one_folds_once_and_is_deleted(end: str) -> None:
    torch.manual_seed(0)
    first, head = nn.Linear(6, 6, dtype=F64), nn.Linear(6, 3, dtype=F64)
    model = hra_fx.transform(nn.Sequential(first, scripted(copy.deepcopy(head))), config("0"))
    turn(model)
    x, base = normal(4, 6), first._parameters["weight"].detach().clone()
    weight = base if end == "delete" else base @ product(model[0], ["default"])
    if end == "delete":
        hra_fx.delete_adapter(model, "default")
    else:
        hra_fx.fold(model if end == "fold" else model[:1])
    assert_close(first.weight, weight, 1e-14)
    assert_close(run(model, x), head(nn.functional.linear(x, weight, first.bias)))
    assert type(first) is nn.Linear


def test_copies_beside_a_scripted_child_switch_and_are_folded() -> None:
    model, plain, _ = with_scripted()
    x = normal(4, 6)
    hra_fx.transform(model, config("0", modules_to_save=["2"], bias="hra_only"), "a")
    turn(model)
    weight = plain[0].weight.detach() @ product(model[0], ["a"])
    new = {"0.weight": weight, "0.bias": model[0].bias.detach(), "2.weight": model[2].weight.detach()}
    wanted = torch.func.functional_call(plain, {**new, "2.bias": model[2].bias.detach()}, (x,))
    assert_close(run(model, x), wanted)
    with hra_fx.disable_adapters(model):
        assert torch.equal(run(model, x), run(plain, x))
    assert_close(run(hra_fx.fold(model), x), wanted)


# New objects of our classes


def test_a_new_object_of_a_sites_class_is_a_plain_layer() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Conv1d(1, 1, 1), nn.Conv2d(2, 3, 3, padding=1))
    model = hra_fx.transform(base.to(F64), config("0", "2"))
    turn(model)
    line, conv = type(model[0])(6, 4).double(), type(model[2])(2, 5, 3, padding=1).double()
    x, image = normal(3, 6), normal(2, 2, 4, 4)
    assert torch.equal(line(x), nn.functional.linear(x, line.weight, line.bias))
    assert torch.equal(conv(image), nn.functional.conv2d(image, conv.weight, conv.bias, padding=1))
    assert list(line.state_dict()) == ["weight", "bias"]
    again = copy.deepcopy(line)
    assert torch.equal(pickle.loads(pickle.dumps(again))(x), line(x))


def test_a_new_object_of_a_models_class_is_a_plain_model() -> None:
    _, model = scaled(x=config("a", "b"))
    x = normal(3, 6)
    torch.manual_seed(3)
    other = type(model)().double()
    expected = nn.functional.linear(x, other.a.weight, other.a.bias) * other.scale
    expected = nn.functional.linear(expected, other.b.weight, other.b.bias)
    assert_close(run(other, x), nn.functional.linear(expected, other.c.weight, other.c.bias), 1e-14)
    assert record_of(other) is None


def test_a_clone_of_a_model_is_adapted_on_its_own() -> None:
    plain, model = scaled(x=config("a", "b"), y=config("b"))
    x = normal(3, 6)
    first, second = oracle(plain, model, ["x"], x), oracle(plain, model, ["y"], x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(run(other, x), first)
        with pytest.warns(hra_fx.HRAWarning, match="'y' is active now"):
            hra_fx.delete_adapter(other, "x")
        assert_close(run(other, x), second)
        assert_close(run(hra_fx.fold(other), x), second)
        assert_close(run(model, x), first)
