"""`set_adapter`: several adapters act as `W Q_a Q_b ...` in the order that was asked for, on every kind of model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model.many import (
    adapted,
    assert_close,
    bert,
    config,
    ids,
    llama,
    moved,
    net,
    normal,
    oracle,
    resnet,
    run,
    sequential,
)
from torch import Tensor, nn

import hra_fx


@dataclass(frozen=True)
class Kind:
    """A model and the layers that tests adapt."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    left: list[str]
    right: list[str]
    apart: list[str]


KINDS = {
    "whole": Kind(sequential, lambda: normal(4, 6), ["0", "3"], ["3"], ["0"]),
    "resnet": Kind(
        resnet,
        lambda: normal(2, 3, 32, 32),
        ["layer1.0.conv1", "layer1.0.conv2", "fc"],
        ["layer1.0.conv2", "fc"],
        ["layer2.0.downsample.0"],
    ),
    "llama": Kind(llama, ids, ["q_proj", "gate_proj"], ["q_proj", "down_proj"], ["v_proj"]),
    "bert": Kind(bert, ids, ["query", "classifier"], ["query", "value"], ["key"]),
}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "even ranks": ({"r": 2}, {"r": 4}),
    "anchors": ({"r": 3}, {"r": 1}),
    "Gram-Schmidt": ({"r": 2, "apply_GS": True}, {"r": 3, "apply_GS": True}),
    "Gram-Schmidt without an anchor": ({"r": 3, "apply_GS": True, "init_weights": False}, {"r": 2}),
    "random starts": ({"r": 3, "init_weights": False}, {"r": 2, "init_weights": False}),
}


def pair(kind: Kind, fields: tuple[dict[str, Any], dict[str, Any]], second: list[str]) -> tuple[nn.Module, nn.Module]:
    return adapted(kind.build(), a=config(*kind.left, **fields[0]), b=config(*second, **fields[1]))


@pytest.mark.parametrize(
    ("name", "fields"), [*(("whole", fields) for fields in PAIRS), *((name, "anchors") for name in KINDS)]
)
def test_two_adapters_act_in_their_order(name: str, fields: str) -> None:
    kind = KINDS[name]
    plain, model = pair(kind, PAIRS[fields], kind.right)
    x, outputs = kind.inputs(), []
    for order in (["a", "b"], ["b", "a"], ["a"], ["b"], []):
        hra_fx.set_adapter(model, order)
        outputs.append(run(model, x))
        assert_close(outputs[-1], oracle(plain, model, order, x))
    assert torch.equal(outputs[-1], run(plain, x))
    assert moved(outputs[0], outputs[1])
    assert moved(outputs[0], outputs[2])
    assert moved(outputs[0], outputs[3])


@pytest.mark.parametrize("name", KINDS)
def test_adapters_on_disjoint_layers_act_together_whatever_the_order(name: str) -> None:
    kind = KINDS[name]
    plain, model = adapted(kind.build(), a=config(*kind.right), b=config(*kind.apart, r=3))
    x = kind.inputs()
    for order in (["a", "b"], ["b", "a"]):
        hra_fx.set_adapter(model, order)
        assert_close(run(model, x), oracle(plain, model, ["a", "b"], x))
    hra_fx.set_adapter(model, "b")
    assert_close(run(model, x), oracle(plain, model, ["b"], x))


def test_three_adapters_act_in_their_order() -> None:
    layers = {"a": config("first", "second"), "b": config("second", r=3), "c": config("first", "head", apply_GS=True)}
    plain, model = adapted(net(), **layers)
    x = normal(4, 6)
    for order in (["a", "b", "c"], ["c", "b", "a"], ["c", "a"], ["b", "c"]):
        hra_fx.set_adapter(model, order)
        assert_close(model(x), oracle(plain, model, order, x))


@pytest.mark.parametrize("name", ["whole", "resnet", "llama"])
def test_two_adapters_act_in_train_mode(name: str) -> None:
    kind = KINDS[name]
    plain, model = pair(kind, PAIRS["anchors"], kind.right)
    hra_fx.set_adapter(model, ["b", "a"])
    plain.train(), model.train()
    x = kind.inputs()
    torch.manual_seed(3)
    wanted = oracle(plain, model, ["b", "a"], x)
    torch.manual_seed(3)
    assert_close(run(model, x), wanted)


def test_the_gradients_are_those_of_the_product() -> None:
    plain, model = adapted(net(), a=config("first"), b=config("first", r=3))
    hra_fx.set_adapter(model, ["b", "a"])
    model(normal(4, 6)).square().sum().backward()
    u = {name: model.first.hra_u[name].detach().clone().requires_grad_() for name in ("a", "b")}
    weight = plain.first.weight
    for column in (*model.first.hra_u.anchor("b").unbind(1), *u["b"].unbind(1), *u["a"].unbind(1)):
        weight = weight @ (torch.eye(6, dtype=torch.float64) - 2 * torch.outer(column, column) / (column @ column))
    torch.func.functional_call(plain, {"first.weight": weight}, (normal(4, 6),)).square().sum().backward()
    for name, vectors in u.items():
        assert_close(model.first.hra_u[name].grad, vectors.grad)


def test_switching_trains_the_active_adapters_only() -> None:
    _, model = adapted(net(), a=config("first", "second"), b=config("first"), c=config("head"))

    def trained() -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained() == {"first.hra_u.a", "second.hra_u.a"}
    hra_fx.set_adapter(model, ["c", "b"])
    assert trained() == {"first.hra_u.b", "head.hra_u.c"}
    hra_fx.set_adapter(model, "a", inference_mode=True)
    assert trained() == set()
    hra_fx.set_adapter(model, [])
    assert trained() == set()


def test_switching_keeps_every_key_and_every_tensor() -> None:
    _, model = adapted(net(), a=config("first"), b=config("first", "second", r=3))
    before = {name: (id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    for order in (["b"], ["a", "b"], [], ["b", "a"]):
        hra_fx.set_adapter(model, order)
        state = model.state_dict(keep_vars=True)
        assert {name: (id(tensor), tensor._version) for name, tensor in state.items()} == before
        assert list(state) == list(before)


class Holder(nn.Module):
    """What a training framework makes around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * 2


WRAPPERS: list[Callable[[nn.Module], Any]] = [
    Holder,
    lambda model: Holder(Holder(model)),
    lambda model: torch.compile(model, backend="eager"),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_is_as_good_as_the_model(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch._dynamo.reset()
    plain, model = adapted(net(), a=config("first"))
    wrapper, x = wrap(model), normal(4, 6)
    hra_fx.add_adapter(wrapper, "b", config("first", "second", init_weights=False))
    hra_fx.set_adapter(wrapper, ["b", "a"])
    scale = wrapper(x) / model(x)
    assert_close(wrapper(x), scale * oracle(plain, model, ["b", "a"], x))
    with hra_fx.disable_adapters(wrapper):
        assert torch.equal(model(x), plain(x))
    hra_fx.merge_adapter(wrapper)
    assert_close(wrapper(x), scale * oracle(plain, model, ["b", "a"], x))
    hra_fx.unmerge_adapter(wrapper)
    hra_fx.set_scale(wrapper, "b", 0)
    hra_fx.delete_adapter(wrapper, "b")
    assert_close(model(x), oracle(plain, model, ["a"], x))
    hra_fx.fold(wrapper)
    assert type(model) is type(plain)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_wrapper_around_two_models_is_refused() -> None:
    both = nn.ModuleList([adapted(net(), a=config("first"))[1], adapted(net(), a=config("first"))[1]])
    with pytest.raises(hra_fx.AdapterError, match=r"^ModuleList: it holds several transformed models \('0', '1'\)\. "):
        hra_fx.set_adapter(both, "a")


def test_a_part_and_a_plain_model_are_refused() -> None:
    plain, model = adapted(net(), a=config("first"))
    with pytest.raises(hra_fx.AdapterError, match=r"^Linear: it is a part of a transformed model, .* Give the model"):
        hra_fx.set_adapter(model.first, "a")
    with pytest.raises(hra_fx.AdapterError, match=r"^Net: it has no reflections\. Call hra_fx\.transform"):
        hra_fx.set_adapter(plain, "a")
    with pytest.raises(hra_fx.AdapterError, match=r"^model: 'net' is no torch\.nn\.Module\. Give a transformed model"):
        hra_fx.set_adapter("net", "a")


def test_a_name_that_fails_leaves_the_set_that_acts() -> None:
    plain, model = adapted(net(), a=config("first"), b=config("second"))
    x = normal(4, 6)
    for wrong in (["b", "nobody"], ["b", "b"]):
        with pytest.raises(hra_fx.AdapterError):
            hra_fx.set_adapter(model, wrong)
        assert_close(model(x), oracle(plain, model, ["a"], x))
        assert model.first.hra_u["a"].requires_grad
