"""`add_adapter`: the model is then as if all layers had been adapted at once, and the first adapter as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.many import adapted, assert_close, bert, config, ids, llama, net, normal, oracle, resnet, run, sequential
from torch import Tensor, nn

import hra_fx

MODELS: dict[str, tuple[Callable[[], nn.Module], Any, list[str], list[str]]] = {
    "whole": (sequential, normal(4, 6), ["0"], ["0", "3"]),
    "resnet": (resnet, normal(2, 3, 32, 32), ["layer1.0.conv1", "fc"], ["layer1.0.conv2", "layer1.1.conv1", "fc"]),
    "llama": (llama, ids(), ["q_proj", "gate_proj"], ["gate_proj", "up_proj", "down_proj", "lm_head"]),
    "bert": (bert, ids(), ["query", "classifier"], ["value", "query", "pooler.dense"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_new_layers_act_as_with_one_transform(name: str) -> None:
    build, x, first, second = MODELS[name]
    plain, model = adapted(build(), a=config(*first), b=config(*second, r=3))
    at_once = hra_fx.transform(build(), config(*first, *second))
    assert {row.path for row in hra_fx.report(model)} == {row.path for row in hra_fx.report(at_once)}
    for order in (["a"], ["b", "a"]):
        hra_fx.set_adapter(model, order)
        assert_close(run(model, x), oracle(plain, model, order, x))


@pytest.mark.parametrize("name", MODELS)
def test_an_added_adapter_does_not_act_and_is_not_trained(name: str) -> None:
    build, x, first, second = MODELS[name]
    model = adapted(build(), a=config(*first))[1]
    before, keys = run(model, x), list(model.state_dict())
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    hra_fx.add_adapter(model, "b", config(*second, init_weights=False))
    assert torch.equal(run(model, x), before)
    assert [key for key in model.state_dict() if not key.endswith("hra_u.b")] == keys
    assert {k: p.requires_grad for k, p in model.named_parameters() if k in flags} == flags
    assert not any(p.requires_grad for k, p in model.named_parameters() if k.endswith(".b"))


def test_an_added_adapter_keeps_flags_that_were_set_by_hand() -> None:
    model = adapted(net(), a=config("first", "second"))[1]
    model.first.hra_u["a"].requires_grad_(False)
    model.head.bias.requires_grad_(True)
    hra_fx.add_adapter(model, "b", config("head"))
    assert not model.first.hra_u["a"].requires_grad
    assert model.second.hra_u["a"].requires_grad
    assert model.head.bias.requires_grad


def test_an_added_adapter_keeps_the_training_of_copies_of_a_scaled_one() -> None:
    model = adapted(net(), a=config("first", modules_to_save=["head"]))[1]
    with pytest.warns(hra_fx.HRAWarning, match="its strength affects reflections only"):
        hra_fx.set_scale(model, "a", 0.5)
    assert model.head.weight.requires_grad
    hra_fx.add_adapter(model, "b", config("second"))
    assert model.head.weight.requires_grad


def test_adapters_on_the_meta_device_wait_for_their_values() -> None:
    plain, model = adapted(net(), a=config("first"))
    hra_fx.add_adapter(model, "b", config("first", "second"), low_cpu_mem_usage=True)
    x = normal(4, 6)
    assert model.second.hra_u["b"].is_meta
    assert_close(model(x), oracle(plain, model, ["a"], x))
    hra_fx.set_adapter(model, "b")
    with pytest.raises(hra_fx.AdapterError, match="the vectors of b are on the meta device, and hold no data"):
        model(x)
    state = {f"{path}.hra_u.b": normal(width, 2) for path, width in (("first", 6), ("second", 8))}
    model.load_state_dict(model.state_dict() | state, assign=True)
    assert_close(model(x), oracle(plain, model, ["b"], x))


def test_adding_in_inference_mode_gives_vectors_that_can_be_trained() -> None:
    model = adapted(net(), a=config("first"))[1]
    with torch.inference_mode():
        hra_fx.add_adapter(model, "b", config("first", "second"))
    hra_fx.set_adapter(model, "b")
    model(normal(4, 6)).sum().backward()
    assert model.second.hra_u["b"].grad is not None


def test_an_adapter_comes_in_the_mode_of_its_layer() -> None:
    model = adapted(net(), a=config("first"))[1].train()
    model.second.eval()
    hra_fx.add_adapter(model, "b", config("first", "second"))
    assert model.first.hra_u.training
    assert not model.second.hra_u.training


def test_adapters_work_inside_a_switched_off_model() -> None:
    plain, model = adapted(net(), a=config("first"))
    x = normal(4, 6)
    with hra_fx.disable_adapters(model):
        hra_fx.add_adapter(model, "b", config("second", init_weights=False))
        assert torch.equal(model(x), plain(x))
    assert_close(model(x), oracle(plain, model, ["a"], x))


def test_adding_to_a_plain_or_merged_model_is_refused() -> None:
    plain, model = adapted(net(), a=config("first"))
    with pytest.raises(hra_fx.AdapterError, match=r"^Net: it has no reflections\. Call hra_fx\.transform"):
        hra_fx.add_adapter(plain, "b", config("first"))
    hra_fx.merge_adapter(model)
    with pytest.raises(hra_fx.AdapterError, match=r"^adapters \['a'\] are merged into the weights\. Call unmerge_ada"):
        hra_fx.add_adapter(model, "b", config("second"))


def test_layers_of_a_model_that_reads_weights_take_a_second_adapter() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.a(x), self.b.weight)

    plain, model = adapted(Reads().double(), a=config("a"), b=config("a", "b", r=3))
    x = normal(4, 4)
    for order in (["a"], ["b"], ["a", "b"]):
        hra_fx.set_adapter(model, order)
        assert_close(model(x), oracle(plain, model, order, x))
