"""`set_adapter`: several adapters act as `W Q_a Q_b ...` in the order that was asked for, also through a wrapper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.many import adapted, assert_close, config, net, normal, oracle, refuses
from torch import Tensor, nn

import hra_fx


def test_three_adapters_act_in_their_order_and_only_flags_change() -> None:
    layers = {"a": config("first", "second"), "b": config("second", r=3), "c": config("first", "head", apply_GS=True)}
    plain, model = adapted(net(), **layers)
    before = [(name, id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()]
    x = normal(4, 6)
    for order in (["a", "b", "c"], ["c", "b", "a"], ["c", "a"], [], ["b", "c"]):
        hra_fx.set_adapter(model, order)
        assert_close(model(x), oracle(plain, model, order, x))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {
            name for name, *_ in before if name.endswith(tuple(f".hra_u.{adapter}" for adapter in order))
        }
        after = [(name, id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()]
        assert after == before


class Holder(nn.Module):
    """What a training framework makes around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * 2


WRAPPERS: list[Callable[[nn.Module], Any]] = [
    lambda model: Holder(Holder(model)),
    lambda model: torch.compile(model, backend="eager"),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_can_be_given_in_place_of_the_model(wrap: Callable[[nn.Module], nn.Module]) -> None:
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
