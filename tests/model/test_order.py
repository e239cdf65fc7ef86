"""The order of parameters, which optimizer states depend on, does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model.many import adapted, assert_close, config, net, normal, oracle, run, seen, turn
from torch import nn

import hra_fx

SAVED: dict[str, Any] = {"bias": "all", "modules_to_save": ["norm"]}


def order(model: nn.Module, besides: str = "") -> dict[str, list[str]]:
    """Names of children, parameters, buffers and the state, in their order, without those of one adapter."""
    found = {path: list(part._modules) for path, part in model.named_modules()}
    found["parameters"] = [name for name, _ in model.named_parameters()]
    found["buffers"] = [name for name, _ in model.named_buffers()]
    found["state"] = list(model.state_dict())
    if not besides:
        return found
    return {
        path: [name for name in names if besides not in name.split(".")]
        for path, names in found.items()
        if besides not in path.split(".")
    }


def model_of_two() -> tuple[nn.Module, nn.Module]:
    """The second one comes to a layer that holds copies already, so its reflections come after these."""
    plain, model = adapted(net(), a=config("first", **SAVED), b=config("second"))
    assert list(model.second._modules) == ["hra_saved", "hra_u"]
    assert list(model.first._modules) == ["hra_u", "hra_saved"]
    return plain, model


@pytest.mark.parametrize(
    ("targets", "fields"),
    [
        (["head"], {}),
        (["first"], {}),
        (["first", "second"], {"bias": "hra_only"}),
        (["second"], {"modules_to_save": ["head"]}),
    ],
)
def test_another_adapter_leaves_the_order(targets: list[str], fields: dict[str, Any]) -> None:
    _, model = model_of_two()
    x = normal(3, 6)
    before, wanted = order(model), run(model, x)
    hra_fx.add_adapter(model, "c", config(*targets, **fields))
    after = order(model, besides="c")
    for path, names in before.items():
        assert [name for name in after[path] if name in names] == names
    for path in ("first", "second"):
        assert after[path] == before[path]
    assert torch.equal(run(model, x), wanted)
    hra_fx.delete_adapter(model, "c")
    assert order(model) == before
    assert torch.equal(run(model, x), wanted)


def test_one_that_is_refused_leaves_the_order() -> None:
    _, model = model_of_two()
    x = normal(3, 6)
    before, everything, wanted = order(model), seen(model), run(model, x)
    with pytest.raises(hra_fx.UnsupportedLayerError, match=r"^first \(Linear\): another adapter reflects this layer"):
        hra_fx.add_adapter(model, "c", config("head", modules_to_save=["first"]))
    assert order(model) == before
    assert seen(model) == everything
    assert torch.equal(run(model, x), wanted)


def test_one_from_a_file_leaves_the_order_too(tmp_path: Path) -> None:
    _, other = adapted(net(), a=config("head", "second"))
    hra_fx.save_adapter(other, tmp_path)
    plain, model = model_of_two()
    x = normal(3, 6)
    before = order(model)
    hra_fx.load_adapter(model, tmp_path, "c")
    after = order(model, besides="c")
    assert {path: after[path] for path in ("first", "second")} == {path: before[path] for path in ("first", "second")}
    assert [name for name in after["parameters"] if name in before["parameters"]] == before["parameters"]
    assert [name for name in after["state"] if name in before["state"]] == before["state"]
    hra_fx.set_adapter(model, "c")
    assert_close(run(model, x), oracle(plain, model, ["c"], x))


def test_an_optimizer_that_is_made_after_resumes_the_state_of_one_before() -> None:
    def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(normal(3, 6)).square().sum().backward()
        optimizer.step()

    outputs = []
    for added in (False, True):
        _, model = model_of_two()
        hra_fx.set_adapter(model, ["a", "b"])
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        trained(model, optimizer)
        if added:
            hra_fx.add_adapter(model, "c", config("head", "second"))
            state = optimizer.state_dict()
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
            optimizer.load_state_dict(state)
        trained(model, optimizer)
        outputs.append(run(model, normal(3, 6)))
    assert torch.equal(outputs[0], outputs[1])


def test_a_state_of_the_new_model_loads_into_one_made_alike() -> None:
    plain, model = model_of_two()
    hra_fx.add_adapter(model, "c", config("head", "second"))
    turn(model, seed=7)
    _, other = model_of_two()
    hra_fx.add_adapter(other, "c", config("head", "second"))
    assert order(other) == order(model)
    other.load_state_dict(model.state_dict())
    x = normal(3, 6)
    for names in (["a"], ["c", "b"]):
        for each in (model, other):
            hra_fx.set_adapter(each, names)
        assert torch.equal(run(other, x), run(model, x))
    assert_close(run(model, x), oracle(plain, model, ["c", "b"], x))
