"""Layers whose weight somebody else reads: found in the graph or in the source, and rotated for every reader."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from adapting import config
from layers.checking import assert_same, check, check_fold, normal, pair, run_dense
from torch import Tensor, nn

import hra_fx
from hra_fx.layers.variants import LinearReflection, WeightReflection
from hra_fx.model.state import sites_of

# ---- real models ----


def swin() -> nn.Module:
    sizes = {"patch_size": [4, 4], "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": [4, 4]}
    return torchvision.models.SwinTransformer(**sizes, num_classes=3, stochastic_depth_prob=0.0)


def swin_v2() -> nn.Module:
    sizes = {"patch_size": [4, 4], "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": [4, 4]}
    blocks = {"block": torchvision.models.swin_transformer.SwinTransformerBlockV2}
    merging = {"downsample_layer": torchvision.models.swin_transformer.PatchMergingV2}
    return torchvision.models.SwinTransformer(**sizes, **blocks, **merging, num_classes=3, stochastic_depth_prob=0.0)


def eva() -> nn.Module:
    sizes = {"img_size": 28, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("eva02_tiny_patch14_224", **sizes)


def beit() -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("beit_base_patch16_224", **sizes)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_bias", "v_bias")):
            nn.init.normal_(parameter)
    return model


IMAGES: dict[str, tuple[Callable[[], nn.Module], list[str], int, set[str]]] = {
    "swin": (swin, ["qkv", "proj"], 32, {"qkv", "proj"}),
    "swin, every layer": (swin, ["qkv", "proj", "mlp.0", "mlp.3", "reduction", "head"], 32, {"qkv", "proj"}),
    "swin v2": (swin_v2, ["qkv", "proj"], 32, {"qkv", "proj"}),
    "eva": (eva, ["qkv", "proj", "head"], 28, {"qkv"}),
    "beit": (beit, ["qkv", "fc1", "head"], 32, {"qkv"}),
}


@pytest.mark.parametrize(("make", "targets", "size", "read"), IMAGES.values(), ids=IMAGES)
def test_vision_models(make: Callable[[], nn.Module], targets: list[str], size: int, read: set[str]) -> None:
    base, model = pair(make, targets)
    on_weight = {path for path, layer in sites_of(model).items() if layer.hra_u.on_weight}
    assert {path.rpartition(".")[2] for path in on_weight} == read
    assert all(path.rpartition(".")[2] not in read for path in sites_of(model).keys() - on_weight)
    images = normal(1, 2, 3, size, size)
    check(base, model, images, rtol=1e-9)
    check_fold(base, model, images, rtol=1e-9)


def mamba() -> nn.Module:
    sizes = {"vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 3}
    sizes |= {"initializer_range": 0.5}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


IDS = torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "targets", [["dt_proj"], ["x_proj"], ["in_proj", "out_proj"], ["conv1d"], "all-linear"], ids=str
)
@pytest.mark.filterwarnings("ignore:.*fast path is not available")
def test_mamba(targets: list[str] | str) -> None:
    base, model = pair(mamba, targets)
    check(base, model, input_ids=IDS, use_cache=False)
    with torch.no_grad():
        written = model.generate(IDS, max_new_tokens=5, do_sample=False)
    folded = check_fold(base, model, input_ids=IDS, use_cache=False)
    assert torch.equal(folded.generate(IDS, max_new_tokens=5, do_sample=False), written)


def t5() -> nn.Module:
    sizes = {"vocab_size": 17, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes))


def test_a_weight_that_is_only_asked_for_its_dtype_stays_on_the_input_side() -> None:
    base, model = pair(t5, ["wo", "wi"])
    assert {type(layer.hra_u) for layer in sites_of(model).values()} == {LinearReflection}
    check(base, model, input_ids=IDS)


# ---- toys: every way to read a weight ----


class Reading(nn.Module):
    """Three layers, `fc` read by whatever `use` does; a subclass that cannot be traced asks for the sum of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 6)
        self.after = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.use(torch.tanh(self.before(x))))

    def use(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Functional(Reading):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias)


class Transposed(Reading):
    def use(self, x: Tensor) -> Tensor:
        return x @ self.fc.weight.T + self.fc.weight.sum(0)


class Inside(Reading):
    """The weight is used otherwise than as a matrix on rows."""

    def use(self, x: Tensor) -> Tensor:
        return x @ torch.softmax(self.fc.weight, -1) @ self.fc.weight


class ByAlias(Reading):
    def use(self, x: Tensor) -> Tensor:
        w = self.fc.weight
        return F.linear(x, w)


class ByLayerAlias(Reading):
    def use(self, x: Tensor) -> Tensor:
        fc = self.fc
        return F.linear(x, fc.weight)


def helped(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


class ByHelper(Reading):
    def use(self, x: Tensor) -> Tensor:
        return helped(self.fc, x)


class ByMethod(Reading):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix())

    def matrix(self) -> Tensor:
        return self.fc.weight


class ByProperty(Reading):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)

    @property
    def matrix(self) -> Tensor:
        return self.fc.weight


class ByGetattr(Reading):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self.fc, "weight"))  # noqa: B009


class BySubscript(Reading):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.fc, nn.Linear(6, 6)])
        del self.fc

    def use(self, x: Tensor) -> Tensor:
        return F.linear(self.layers[1](x), self.layers[0].weight)


class ByLoop(BySubscript):
    def use(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(F.linear(x, layer.weight))
        return x


class CalledAndRead(Reading):
    def use(self, x: Tensor) -> Tensor:
        return self.fc(x) + F.linear(2 * x, self.fc.weight)


class ReadByAnother(nn.Module):
    """Reads the weight of a layer that it was given."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.given = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.given.weight)


class Shared(Reading):
    """Called by one module, read by another."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = ReadByAnother(self.fc)

    def use(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.reader(x)


WAYS: list[type[nn.Module]] = [
    *(Functional, Transposed, Inside, ByAlias, ByLayerAlias, ByHelper, ByMethod, ByProperty, ByGetattr),
    *(BySubscript, ByLoop, CalledAndRead, Shared),
]
X = normal(2, 3, 6)
TARGETS = r"before|after|fc|layers\.\d"


def untraceable(kind: Any) -> Any:
    """The same forward after a question about a value, which no trace can answer."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            x = x + 1
        return self.after(self.use(torch.tanh(self.before(x))))

    return type(f"Untraceable{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


@pytest.mark.parametrize("kind", WAYS)
def test_every_way_to_read_is_found_in_a_traced_graph(kind: type[nn.Module]) -> None:
    base, model = pair(kind, TARGETS)
    assert {row.region for row in hra_fx.report(model).rows} == {"whole"}
    assert isinstance(model.before.hra_u, LinearReflection)
    check(base, model, X)
    folded = check_fold(base, model, X)
    assert type(folded) is kind


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("fields", [{"r": 2}, {"r": 3, "apply_GS": True}], ids=["even", "GS"])
def test_the_graph_of_a_reader_computes_what_the_model_does(kind: type[nn.Module], fields: dict[str, Any]) -> None:
    base, model = pair(kind, TARGETS, **fields)
    graph = hra_fx.graphs(model)[""]
    mine = {name: id(parameter) for name, parameter in model.named_parameters()}
    theirs = {name: id(parameter) for name, parameter in graph.named_parameters()}
    assert theirs.items() <= mine.items()
    assert {name for name in mine if ".hra_u." in name} <= theirs.keys()
    assert_same(graph(X), model(X), rtol=1e-14)
    assert_same(graph(X), run_dense(base, model, X))


SEEN_IN_THE_SOURCE = {Functional, Transposed, Inside, ByAlias, ByMethod, ByProperty, CalledAndRead, Shared}


@pytest.mark.parametrize("kind", [kind for kind in WAYS if kind in SEEN_IN_THE_SOURCE])
def test_what_cannot_be_traced_is_read_in_its_source(kind: type[nn.Module]) -> None:
    base, model = pair(untraceable(kind), TARGETS)
    assert {row.region for row in hra_fx.report(model).rows} == {"alone"}
    assert isinstance(model.fc.hra_u, WeightReflection)
    assert isinstance(model.before.hra_u, LinearReflection)
    check(base, model, X)
    check_fold(base, model, X)


@pytest.mark.parametrize("kind", [kind for kind in WAYS if kind not in SEEN_IN_THE_SOURCE])
def test_what_neither_graph_nor_source_shows_is_refused_at_the_first_call(kind: type[nn.Module]) -> None:
    _, model = pair(untraceable(kind), TARGETS)
    for _ in range(2):
        with pytest.raises(hra_fx.UnsupportedLayerError) as caught:
            model(X)
        path = "layers.0" if issubclass(kind, BySubscript) else "fc"
        assert str(caught.value).startswith(f"{path}: ")
        assert f"the model (Untraceable{kind.__name__}, in linear) reads its weight" in str(caught.value)
        assert "Take the adapters off (hra_fx." in str(caught.value)
    hra_fx.fold(model)
    hra_fx.transform(model, config("before", "after"))
    model(X)


# ---- regions ----


class Left(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.own = layer, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.layer(x))


class Right(Left):
    def forward(self, x: Tensor) -> Tensor:
        return self.own(F.linear(x, self.layer.weight))


class TwoRegions(nn.Module):
    """One layer, called in one region and read in another; their parent cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(6, 6)
        self.left, self.right = Left(shared), Right(shared)

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x)
        return self.right(x if float(x.detach().sum()) < 1e9 else -x)


def test_read_in_one_region_and_called_in_another() -> None:
    base, model = pair(TwoRegions, ["layer", "own"])
    rows = {row.path: row for row in hra_fx.report(model).rows}
    assert rows.keys() == {"left.layer", "left.own", "right.own"}
    assert isinstance(model.left.layer.hra_u, WeightReflection)
    check(base, model, X)
    graphs = hra_fx.graphs(model)
    for name in ("left", "right"):
        assert_same(graphs[name](X), getattr(model, name)(X), rtol=1e-14)
    check_fold(base, model, X)


def test_hooks_on_a_layer_that_is_read_do_not_change_what_it_is() -> None:
    base, model = pair(CalledAndRead, TARGETS)
    seen = []
    model.fc.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert_same(model(X), run_dense(base, model, X))
    assert seen == [(3, 6)]


def test_a_second_adapter_comes_to_a_site_on_the_weight() -> None:
    base, model = pair(CalledAndRead, TARGETS)
    hra_fx.add_adapter(model, "other", config("fc"))
    hra_fx.set_adapter(model, ["default", "other"])
    with torch.no_grad():
        model.fc.hra_u["other"].normal_()
    assert_same(model(X), run_dense(base, model, X, adapters=("default", "other")))


class Late(Reading):
    def use(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_a_reader_that_came_after_the_first_adapter_is_refused() -> None:
    model = hra_fx.transform(Late(), config("fc", "before"))
    model.tail = ReadByAnother(model.fc)
    Late.use, before = lambda self, x: self.tail(self.fc(x)), Late.use
    try:
        state = {name: id(p) for name, p in model.named_parameters()}
        with pytest.raises(hra_fx.UnsupportedLayerError) as caught:
            hra_fx.add_adapter(model, "other", config("after", "fc"))
        assert str(caught.value).startswith("fc: ")
        assert "reads its weight by now, and its reflections act on its input. Fold the adapters" in str(caught.value)
        assert {name: id(p) for name, p in model.named_parameters()} == state
    finally:
        Late.use = before


def test_a_copy_of_the_weight_elsewhere_is_seen_rotated() -> None:
    base, model = pair(Functional, TARGETS)
    plain = base.fc.weight.detach().clone()
    assert torch.equal(model.fc.hra_base, plain) and model.fc.hra_base is dict(model.named_parameters())["fc.weight"]
    assert not torch.equal(model.fc.weight, plain)
    assert torch.equal(model.state_dict()["fc.weight"], plain)
    twin = copy.deepcopy(model)
    assert_same(twin.fc.weight, model.fc.weight, rtol=1e-14)
