"""Two adapters are added, switched, disabled, merged, deleted and folded on every kind of model, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.failing import folded
from model.many import (
    F64,
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
    stored,
    weights,
)
from torch import Tensor, nn

import hra_fx
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.class_swap import original_class


class Reads(nn.Module):
    """Reads the weight of a layer, which it does not call: `(n, 6) -> (n, 6)`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6, dtype=F64), nn.Linear(6, 6, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.a(x), self.b.weight)


#: A model, its inputs, and the layers of two adapters: some of one alone, some of both.
KINDS: dict[str, tuple[Callable[[], nn.Module], Any, list[str], list[str]]] = {
    "net": (net, normal(4, 6), ["first", "second"], ["second", "head"]),
    "reads a weight": (Reads, normal(4, 6), ["a"], ["a", "b"]),
    "sequential": (sequential, normal(4, 6), ["0"], ["0", "3"]),
    "resnet": (resnet, normal(2, 3, 32, 32), ["layer1.0.conv1", "fc"], ["layer2.0.downsample.0", "fc"]),
    "llama": (llama, ids(), ["q_proj", "gate_proj"], ["gate_proj", "down_proj", "lm_head"]),
    "bert": (bert, ids(), ["query", "classifier"], ["value", "query", "pooler.dense"]),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def two(name: str) -> tuple[nn.Module, nn.Module, Any]:
    """A plain copy, the model with both adapters, and inputs."""
    build, x, first, second = KINDS[name]
    return *adapted(build(), a=config(*first), b=config(*second, r=3)), x


@every_kind
def test_an_added_adapter_does_not_act_and_is_not_trained(name: str) -> None:
    build, x, first, second = KINDS[name]
    model = adapted(build(), a=config(*first))[1]
    before, keys = run(model, x), list(model.state_dict())
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    hra_fx.add_adapter(model, "b", config(*second, init_weights=False))
    assert torch.equal(run(model, x), before)
    assert [key for key in model.state_dict() if not key.endswith("hra_u.b")] == keys
    assert {k: p.requires_grad for k, p in model.named_parameters() if k in flags} == flags
    assert not any(p.requires_grad for k, p in model.named_parameters() if k.endswith(".b"))
    at_once = hra_fx.transform(build(), config(*first, *second))
    assert {row.path for row in hra_fx.report(model)} == {row.path for row in hra_fx.report(at_once)}


@every_kind
def test_two_adapters_act_in_the_order_that_was_set(name: str) -> None:
    plain, model, x = two(name)
    outputs = []
    for order in (["a", "b"], ["b", "a"], ["a"], ["b"], []):
        hra_fx.set_adapter(model, order)
        outputs.append(run(model, x))
        assert_close(outputs[-1], oracle(plain, model, order, x))
    assert torch.equal(outputs[-1], run(plain, x))
    assert all(moved(outputs[0], other) for other in outputs[1:])
    hra_fx.set_adapter(model, ["b", "a"])
    with hra_fx.disable_adapters(model):
        assert torch.equal(run(model, x), run(plain, x))
    plain.train(), model.train()
    torch.manual_seed(3)
    wanted = oracle(plain, model, ["b", "a"], x)
    torch.manual_seed(3)
    assert_close(run(model, x), wanted)


@every_kind
def test_merged_weights_are_the_product_and_outputs_stay(name: str) -> None:
    plain, model, x = two(name)
    hra_fx.set_adapter(model, ["b", "a"])
    wanted = oracle(plain, model, ["b", "a"], x)
    hra_fx.merge_adapter(model)
    assert_close(run(model, x), wanted)
    for key, weight in weights(plain, model, ["b", "a"]).items():
        assert_close(stored(model, key), weight)
    hra_fx.unmerge_adapter(model)
    assert_close(run(model, x), wanted)
    assert all(torch.equal(stored(model, key), value) for key, value in plain.named_parameters())


@every_kind
def test_after_a_deletion_the_model_is_as_if_that_adapter_had_never_been_there(name: str) -> None:
    plain, model, x = two(name)
    hra_fx.set_adapter(model, ["b", "a"])
    hra_fx.delete_adapter(model, "b")
    build, _, first, _ = KINDS[name]
    alone = hra_fx.transform(build(), config(*first), "a")
    assert list(model.state_dict()) == list(alone.state_dict())
    assert [(original_class(part), isinstance(part, AdaptedLayer)) for part in model.modules()] == [
        (original_class(part), isinstance(part, AdaptedLayer)) for part in alone.modules()
    ]
    assert [row.path for row in hra_fx.report(model)] == [row.path for row in hra_fx.report(alone)]
    assert_close(run(model, x), oracle(plain, model, ["a"], x))


@every_kind
def test_adapters_are_folded_one_after_another(name: str) -> None:
    plain, model, x = two(name)
    hra_fx.set_adapter(model, ["a", "b"])
    wanted, new = oracle(plain, model, ["a", "b"], x), weights(plain, model, ["a", "b"])
    for adapter in ("a", "b"):
        hra_fx.fold(model, adapter)
        assert_close(run(model, x), wanted)
    folded(plain, model, new)
