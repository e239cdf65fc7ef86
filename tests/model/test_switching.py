"""`set_adapter` and `delete_adapter`: which adapters act, in which order; through wrappers and `torch.compile` too."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from model.many import SAVED, adapted, assert_close, config, net, normal, oracle, refuses, seen
from torch import Tensor, nn
from torch._dynamo.utils import counters

import hra_fx


class Holder(nn.Module):
    """What a training framework makes around a model."""

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


# ---- `torch.compile` compiles each set of adapters once ----


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("_fresh_dynamo")
def test_torch_compile_does_not_compile_again_for_a_set_that_it_knows() -> None:
    """The functions get the compiled model, as from a user."""
    plain, model = adapted(net(), a=config("first", "second"), b=config("first", r=3))
    fast, x = torch.compile(model, backend="eager", fullgraph=True), normal(4, 6)
    sets = (["a"], ["a", "b"], [])
    for order in sets:
        hra_fx.set_adapter(fast, order)
        fast(x)
    graphs = compiled_graphs()
    assert graphs
    for order in (*sets, *reversed(sets)):
        hra_fx.set_adapter(fast, order)
        assert_close(fast(x), oracle(plain, model, order, x))
    assert compiled_graphs() == graphs


@pytest.mark.usefixtures("_fresh_dynamo")
def test_torch_compile_sees_disabled_merged_and_scaled_adapters() -> None:
    plain, model = adapted(net(), a=config("second"), b=config("first", r=3))
    fast, x = torch.compile(model, backend="eager", fullgraph=True), normal(4, 6)
    hra_fx.set_adapter(fast, ["a", "b"])
    wanted = oracle(plain, model, ["a", "b"], x)
    for _ in range(2):
        assert_close(fast(x), wanted)
        with hra_fx.disable_adapters(fast):
            assert torch.equal(fast(x), plain(x))
        hra_fx.merge_adapter(fast, ["a"])
        assert_close(fast(x), wanted)
        hra_fx.unmerge_adapter(fast)
        hra_fx.set_scale(fast, "b", 0)
        assert_close(fast(x), oracle(plain, model, ["a"], x))
        hra_fx.set_scale(fast, "b", 1)


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


def test_the_last_one_leaves_the_base_model() -> None:
    base = net()
    for index, parameter in enumerate(base.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before, x = seen(base), normal(4, 6)
    wanted = base(x)
    hra_fx.transform(base, config("first", **SAVED), "a")
    hra_fx.add_adapter(base, "b", config("first", "second", r=3))
    hra_fx.delete_adapter(base, "b")
    hra_fx.delete_adapter(base, "a")
    assert seen(base) == before
    assert torch.equal(base(x), wanted)


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
