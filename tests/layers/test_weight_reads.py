"""Layers whose weight another module reads: every reader gets `W Q`, with gradients to every adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from adapting import config
from layers.checking import assert_same, check, check_fold, dense_weights, normal, pair, run_dense
from torch import Tensor, nn

import hra_fx

# ---- real models ----


def swin(**blocks: Any) -> nn.Module:
    sizes = {"patch_size": [4, 4], "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": [4, 4]}
    return torchvision.models.SwinTransformer(**sizes, **blocks, num_classes=3, stochastic_depth_prob=0.0)


def swin_v2() -> nn.Module:
    parts = torchvision.models.swin_transformer
    return swin(block=parts.SwinTransformerBlockV2, downsample_layer=parts.PatchMergingV2)


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


IMAGES: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    "swin": (swin, ["qkv", "proj", "mlp.0", "mlp.3", "reduction", "head"], 32),
    "swin v2": (swin_v2, ["qkv", "proj"], 32),
    "eva": (eva, ["qkv", "proj", "head"], 28),
    "beit": (beit, ["qkv", "fc1", "head"], 32),
}


@pytest.mark.parametrize(("make", "targets", "size"), IMAGES.values(), ids=IMAGES)
def test_vision_models(make: Callable[[], nn.Module], targets: list[str], size: int) -> None:
    base, model = pair(make, targets)
    images = normal(1, 2, 3, size, size)
    check(base, model, images, rtol=1e-9)
    check_fold(base, model, images, rtol=1e-9)


def mamba() -> nn.Module:
    sizes = {"vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 3}
    sizes |= {"initializer_range": 0.5}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


IDS = torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("targets", [["dt_proj"], ["conv1d"], "all-linear"], ids=str)
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


def test_a_model_that_reads_the_dtype_of_a_weight() -> None:
    base, model = pair(t5, ["wo", "wi"])
    check(base, model, input_ids=IDS)


# ---- every way to read a weight ----


class Reading(nn.Module):
    """Three layers, `fc` read by whatever `use` does."""

    branches = False

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 6)
        self.after = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and float(x.detach().sum()) > 1e9:  # which no trace can answer
            x = x + 1
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


class ByMetadata(Reading):
    """Asks the weight what it is, and makes tensors like it."""

    def use(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        x = x.to(weight.dtype).to(weight.device) + torch.zeros_like(weight).sum() + weight.new_zeros(1)
        return F.linear(x, weight.reshape(weight.shape[0], weight.size(1)))


def helped(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


class ByHelper(Reading):
    def use(self, x: Tensor) -> Tensor:
        return helped(self.fc, x)


class ByProperty(Reading):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)

    @property
    def matrix(self) -> Tensor:
        return self.fc.weight


class ByGetattr(Reading):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self.fc, "weight"))  # noqa: B009


class ByLoop(Reading):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.fc, nn.Linear(6, 6)])
        del self.fc

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


class ReadAtTheCall(nn.Module):
    """Reads the weight of a layer that its call gives it."""

    def forward(self, x: Tensor, given: nn.Linear) -> Tensor:
        return F.linear(x, given.weight)


class GivenAtTheCall(Reading):
    def __init__(self) -> None:
        super().__init__()
        self.reader = ReadAtTheCall()

    def use(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.reader(x, self.fc)


WAYS: list[type[Reading]] = [
    *(Functional, Transposed, Inside, ByMetadata, ByHelper, ByProperty, ByGetattr, ByLoop),
    *(CalledAndRead, Shared, GivenAtTheCall),
]
X = normal(2, 3, 6)
TARGETS = r"before|after|fc|layers\.\d"


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("branches", [False, True], ids=["traceable", "untraceable"])
def test_every_reader_gets_the_rotated_weight(
    kind: type[Reading], branches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "branches", branches)
    base, model = pair(kind, TARGETS)
    check(base, model, X)
    assert type(check_fold(base, model, X)) is kind


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
    reads = [node for node in graph.graph.nodes if str(node.target).endswith(".hra_base")]
    assert len(reads) >= 1
    for node in reads:
        (reflection,) = node.users
        assert reflection.target == str(node.target).replace(".hra_base", ".hra_u")
        assert reflection.kwargs == {"weight": node} and not reflection.args


class Left(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.own = layer, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.layer(x))


class Right(Left):
    def forward(self, x: Tensor) -> Tensor:
        return self.own(F.linear(x, self.layer.weight))


class TwoParents(nn.Module):
    """One layer, called by one module and read by another; their parent cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(6, 6)
        self.left, self.right = Left(shared), Right(shared)

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x)
        return self.right(x if float(x.detach().sum()) < 1e9 else -x)


def test_called_by_one_parent_and_read_by_another() -> None:
    base, model = pair(TwoParents, ["layer", "own"])
    check(base, model, X)
    graphs = hra_fx.graphs(model)
    assert graphs.keys() == {"left", "right"}
    for name, graph in graphs.items():
        assert_same(graph(X), getattr(model, name)(X), rtol=1e-14)
    check_fold(base, model, X)


def test_hooks_on_a_layer_that_is_read_do_not_change_what_it_is() -> None:
    base, model = pair(CalledAndRead, TARGETS)
    seen = []
    model.fc.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert_same(model(X), run_dense(base, model, X))
    assert seen == [(3, 6)]


def test_a_reader_that_comes_after_the_adapters() -> None:
    base, model = pair(CalledAndRead, TARGETS)
    hra_fx.add_adapter(model, "other", config("fc"))
    hra_fx.set_adapter(model, ["default", "other"])
    with torch.no_grad():
        model.fc.hra_u["other"].normal_()
    assert_same(model(X), run_dense(base, model, X, adapters=("default", "other")))
    wanted = dense_weights(base, model, ("default", "other"))["fc.weight"]
    assert_same(ReadByAnother(model.fc)(X), F.linear(X, wanted))
