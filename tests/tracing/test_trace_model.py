"""`transform(..., trace=True)`: a GraphModule in which each reflection is a node, by torch.fx."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_modules import COPIES, X, config
from layers.checking import assert_same, check, gradients, normal, randomise, vectors_of
from torch import Tensor, fx, nn
from torchvision.models.swin_transformer import SwinTransformer
from tracing.models import Dropout, Two

import hra_fx


def traced(make: Callable[[], nn.Module] = Dropout, *targets: str, **fields: Any) -> tuple[nn.Module, Any]:
    """A base model, and its adapted GraphModule with random vectors."""
    torch.manual_seed(0)
    base = make().double()
    model = hra_fx.transform(copy.deepcopy(base), config(*targets, **fields), trace=True)
    randomise(model)
    return base, model


def calls(model: fx.GraphModule) -> list[str]:
    targets = [str(node.target) for node in model.graph.find_nodes(op="call_module")]
    return [target for target in targets if target != "hra_factors"]


def test_each_reflection_is_a_node_and_modules_are_shared() -> None:
    torch.manual_seed(0)
    base = Dropout().double()
    parameters, keys = dict(base.named_parameters()), list(base.state_dict())
    model = hra_fx.transform(base, config(), trace=True)
    assert isinstance(model, fx.GraphModule) and type(model).__name__ == "Dropout"
    assert calls(model)[:2] == ["first.hra_u", "first"] and calls(model)[-2:] == ["second.hra_u", "second"]
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert [key for key in model.state_dict() if "hra_u" not in key] == keys
    assert hra_fx.transform(model, config(), trace=True) is model


@pytest.mark.parametrize("fields", [{"r": 2}, {"apply_GS": True}, {"r": 2, "init_weights": False}], ids=str)
def test_it_computes_what_the_eager_adapted_model_does(fields: dict[str, Any]) -> None:
    base, model = traced(Dropout, **fields)
    eager = hra_fx.transform(copy.deepcopy(base), config(**fields))
    eager.load_state_dict(model.state_dict())
    for training in (True, False):
        found = []
        for each in (model.train(training), eager.train(training)):
            torch.manual_seed(5)
            output = each(X)
            found.append([output, *gradients(output, list(vectors_of(each).values()))])
        assert_same(*found)
    check(base, model, X)


def test_adapters_are_added_switched_deleted_saved_and_loaded(tmp_path: Path) -> None:
    base, model = traced(Dropout, "first", bias="hra_only")
    hra_fx.add_adapter(model, "other", config("second"))
    randomise(model)
    assert calls(model)[-2:] == ["second.hra_u", "second"]
    for name in ("default", "other"):
        hra_fx.set_adapter(model, name)
        hra_fx.save_adapter(model, tmp_path / name, name)
        for loaded in (
            hra_fx.load_adapter(copy.deepcopy(base), tmp_path / name),
            hra_fx.load_adapter(fx.symbolic_trace(copy.deepcopy(base).eval()), tmp_path / name),
        ):
            assert_same(loaded.eval()(X), model.eval()(X))
    with hra_fx.disable_adapters(model):
        assert_same(model(X), base.eval()(X))
    hra_fx.set_adapter(model, "default")
    hra_fx.delete_adapter(model, "other")
    assert "second.hra_u" not in calls(model)
    for copied in COPIES:
        assert_same(copied(model)(X), model(X))


def swin() -> nn.Module:
    return SwinTransformer([2, 2], 8, [1, 1], [1, 2], [2, 2], num_classes=3, stochastic_depth_prob=0.3)


def beit() -> nn.Module:
    import timm

    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    model: Any = timm.create_model("beit_base_patch16_224", **sizes, drop_path_rate=0.3, init_values=1.0)
    nn.init.normal_(model.head.weight)  # it starts near zero
    return model


@pytest.mark.parametrize(
    ("make", "targets", "reads"),
    [
        (swin, ["qkv", "proj", "mlp.0", "mlp.3"], "features.1.0.attn.qkv.hra_u"),
        (beit, ["qkv", "attn.proj", "fc1", "fc2"], "blocks.0.attn.qkv.hra_u"),
    ],
    ids=["swin", "beit"],
)
def test_vision_models_and_readers_of_weights(make: Callable[[], nn.Module], targets: list[str], reads: str) -> None:
    base, model = traced(make, *targets)
    of_weights = [str(node.target) for node in model.graph.nodes if "weight" in node.kwargs and "hra" in node.meta]
    assert reads in of_weights
    check(base, model, normal(3, 2, 3, 16, 16))
    check(base, copy.deepcopy(model), normal(3, 2, 3, 16, 16))


class Unused(Two):
    """Has tensors that no call uses, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
        self.token = nn.Parameter(torch.zeros(3))
        self.register_buffer("table", torch.ones(8, dtype=torch.float64), persistent=False)

    def middle(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden * self.table)


def test_unused_layers_keep_their_keys_and_adapters() -> None:
    base, model = traced(Unused, "first", "second", "head.0")
    eager = hra_fx.transform(copy.deepcopy(base), config("first", "second", "head.0"))
    assert model.state_dict().keys() == eager.state_dict().keys()
    eager.load_state_dict(model.state_dict())
    assert_same(model(X), eager(X))
    assert hra_fx.fold(model).state_dict().keys() == base.state_dict().keys()


class Late(Two):
    """Its first layers, one of them shared, are called last."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(8))
        self.inner = nn.ModuleDict({"shared": self.second, "own": nn.Linear(8, 8)})
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner["own"](self.first(x)) * self.scale + self.token
        return self.inner["shared"](hidden)


def test_modules_and_parameters_keep_their_order_and_first_names() -> None:
    base, model = traced(Late, "second")
    assert list(dict(fx.symbolic_trace(base).named_modules())) == ["", "first", "inner", "inner.own", "second"]
    eager = hra_fx.transform(copy.deepcopy(base), config("second"))
    assert list(dict(model.named_parameters())) == list(dict(eager.named_parameters()))
    assert "second.hra_u.default" in dict(model.named_parameters())


def test_with_an_example_torch_fx_still_goes_first() -> None:
    model = hra_fx.transform(Dropout().double(), config(), trace=True, example_inputs=X, verify=True)
    assert calls(model)[0] == "first.hra_u"
