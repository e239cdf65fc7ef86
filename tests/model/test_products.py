"""`combine` where names end alike, where nothing turns, and what is made in inference mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model.many import F64, adapted, assert_close, config, moved, net, normal, oracle, run, seen, turn
from oracles import dense_q
from torch import Tensor, nn

import hra_fx
from hra_fx.model.state import sites_of


class Alike(nn.Module):
    """Two layers whose paths end alike: `(n, 6) -> (n, 6)`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.inner = nn.Sequential()
        self.inner.add_module("fc", nn.Linear(6, 6))
        self.fcx = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fcx(self.inner(torch.tanh(self.fc(x))))


def alike(**configs: hra_fx.HRAConfig) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return adapted(Alike().to(F64).eval(), **configs)


def layers_of(model: nn.Module, name: str) -> list[str]:
    return [path for path, layer in sites_of(model).items() if name in layer.hra_u]


def check_product(plain: nn.Module, model: nn.Module, layers: list[str]) -> None:
    x = normal(3, 6)
    wanted = oracle(plain, model, ["a", "b"], x)
    hra_fx.combine(model, ["a", "b"], "c")
    assert layers_of(model, "c") == layers
    hra_fx.set_adapter(model, "c")
    assert_close(run(model, x), wanted)
    assert moved(wanted, run(plain, x))


@pytest.mark.parametrize("fields", [{}, {"exclude_modules": ["inner.fc"]}, {"exclude_modules": r"inner\..*"}])
def test_the_product_is_on_the_very_layers_of_its_parts(fields: dict[str, object]) -> None:
    plain, model = alike(a=config("fc", **fields), b=config("fc", **fields))
    check_product(plain, model, ["fc"] if fields else ["fc", "inner.fc"])


@pytest.mark.parametrize("third", ["inner.fc", "fcx"])
def test_layers_of_a_third_one_that_end_alike_stay_its_own(third: str) -> None:
    outer = {"target_modules": r"fc"}
    plain, model = alike(a=config(**outer), b=config(**outer), z=config(third))
    x = normal(3, 6)
    assert layers_of(model, "a") == ["fc"]
    check_product(plain, model, ["fc"])
    hra_fx.set_adapter(model, ["c", "z"])
    assert_close(run(model, x), oracle(plain, model, ["a", "b", "z"], x))


def test_a_dot_in_a_path_stands_for_itself(tmp_path: Path) -> None:
    """`0.1` as a pattern would name `041` as well."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
            self.add_module("041", nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule("041")(self.get_submodule("0")(x))

    def odd() -> nn.Module:
        torch.manual_seed(0)
        return Odd().to(F64).eval()

    plain, model = adapted(odd(), a=config("0.1"), b=config("0.1"))
    check_product(plain, model, ["0.1"])
    hra_fx.save_adapter(model, tmp_path, "c")
    again = hra_fx.load_adapter(odd(), tmp_path)
    assert layers_of(again, "default") == ["0.1"]
    assert_close(run(again, normal(3, 6)), run(model, normal(3, 6)), 1e-14)


def test_the_product_is_saved_with_the_very_layers_that_it_has(tmp_path: Path) -> None:
    plain, model = alike(a=config(target_modules="fc"), b=config(target_modules="fc"))
    x = normal(3, 6)
    check_product(plain, model, ["fc"])
    hra_fx.save_adapter(model, tmp_path, "c")
    torch.manual_seed(0)
    again = hra_fx.load_adapter(Alike().to(F64).eval(), tmp_path)
    assert layers_of(again, "default") == ["fc"]
    assert_close(run(again, x), run(model, x), 1e-14)


def test_adapters_of_strength_zero_have_no_product() -> None:
    plain, model = adapted(net(), a=config("first", "second"), b=config("second"))
    x = normal(3, 6)
    hra_fx.set_scale(model, "a", 0)
    hra_fx.set_scale(model, "b", 0)
    before = seen(model)
    text = r"^adapters \['a', 'b'\]: all have strength 0, so their product is the identity\. Set others first\.$"
    with pytest.raises(hra_fx.AdapterError, match=text):
        hra_fx.combine(model, ["a", "b"], "c")
    assert seen(model) == before
    assert_close(run(model, x), run(plain, x), 1e-14)
    hra_fx.set_scale(model, "b", 1)
    hra_fx.combine(model, ["a", "b"], "c")
    hra_fx.set_adapter(model, "c")
    assert_close(run(model, x), oracle(plain, model, ["b"], x))


# Inference mode


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


def test_a_strength_that_is_set_in_inference_mode_lets_gradients_through() -> None:
    plain, model = adapted(net(), a=config("second"))
    hra_fx.add_adapter(model, "b", config("first"))
    turn(model)
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


# Odd ranks


def test_an_odd_plain_adapter_is_set_to_full_strength() -> None:
    plain, model = adapted(net(), a=config("first", "second", r=3, init_weights=False))
    x = normal(3, 6)
    before = seen(model)
    hra_fx.set_scale(model, "a", 1)
    assert seen(model) == before
    assert_close(run(model, x), oracle(plain, model, ["a"], x))
    with pytest.raises(hra_fx.AdapterError, match=r"^first: adapter 'a': .*odd"):
        hra_fx.set_scale(model, "a", 0.5)
    assert seen(model) == before
    hra_fx.set_scale(model, "a", 1.0)
    assert_close(run(model, x), oracle(plain, model, ["a"], x))
