"""What is refused, in what words, and that the model is as it was then; and what must not be refused."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable

import accelerate
import peft
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from adapting import config
from refusals import mlp, refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import hra_fx

# ---- the layer itself ----


class OwnCall(nn.Linear):
    """Never comes to its forward."""

    def __call__(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


class NamedLinear(nn.Linear):
    """A subclass without a forward of its own."""


def with_layer(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(plain=nn.Linear(6, 6), odd=layer))


def with_instance_forward() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.forward = lambda x: x
    return layer


def with_attribute() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.hra_u = "mine"
    return layer


def with_old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(6, 6))


def with_weight(weight: Tensor) -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Marked(Tensor):
    """A tensor subclass, such as a quantised or distributed one is."""


LAYERS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "meta": (lambda: nn.Linear(6, 6, device="meta"), "meta device, without data", "Load the weights first"),
    "instance forward": (with_instance_forward, "forward is set on the instance", "Remove it"),
    "own attribute": (with_attribute, "attribute 'hra_u' already", "Rename that"),
    "own call": (lambda: OwnCall(6, 6), "has a __call__ of its own", "exclude_modules"),
    "LazyLinear": (lambda: nn.LazyLinear(6), "not initialised yet", "Run the model once first"),
    "LazyConv2d": (lambda: nn.LazyConv2d(6, 3), "not initialised yet", "Run the model once first"),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
        "its weight is computed from other parameters",
        "remove_parametrizations",
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Conv2d(6, 6, 3)),
        "its weight is computed from other parameters",
        "remove_parametrizations",
    ),
    "orthogonal": (
        lambda: parametrizations.orthogonal(nn.Linear(6, 6)),
        "its weight is computed from other parameters",
        "remove_parametrizations",
    ),
    "weight_norm, Conv1d": (
        lambda: parametrizations.weight_norm(nn.Conv1d(6, 6, 3)),
        "its weight is computed from other parameters",
        "remove_parametrizations",
    ),
    "orthogonal, attention": (
        lambda: parametrizations.orthogonal(nn.MultiheadAttention(6, 2), "in_proj_weight"),
        "its weight is computed from other parameters",
        "remove_parametrizations",
    ),
    "attention of several widths": (
        lambda: nn.MultiheadAttention(6, 2, vdim=4),
        "its inputs differ in width (kdim, vdim)",
        "name its out_proj",
    ),
    "old weight_norm": (with_old_weight_norm, "its weight is computed from other parameters", "remove_weight_norm"),
    "old spectral_norm": (
        lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
        "its weight is computed from other parameters",
        "exclude_modules",
    ),
    "int8": (lambda: with_weight(torch.ones(6, 6, dtype=torch.int8)), "its weight is a torch.int8", "exclude_modules"),
    "complex": (lambda: nn.Linear(6, 6, dtype=torch.complex64), "its weight is a torch.complex64", "exclude_modules"),
    "float8": (
        lambda: with_weight(torch.ones(6, 6).to(torch.float8_e4m3fn)),
        "its weight is a torch.float8_e4m3fn",
        "exclude_modules",
    ),
    "subclass": (
        lambda: with_weight(torch.ones(6, 6).as_subclass(Marked)),
        "its weight is a Marked, which is not a plain floating-point tensor",
        "exclude_modules",
    ),
    "empty": (lambda: with_weight(torch.ones(0, 6)), r"its weight is empty, of shape (0, 6)", "exclude_modules"),
    "no weight": (lambda: without_weight(), "not initialised yet", "Run the model once first"),
}


def without_weight() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.weight = None
    return layer


@pytest.mark.parametrize(("make", "reason", "way_out"), LAYERS.values(), ids=LAYERS.keys())
def test_layer_is_refused(make: Callable[[], nn.Module], reason: str, way_out: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature", UserWarning)
        model = with_layer(make())
    kind = type(model[1]).__name__
    message = refused(model, config("plain", "odd"))
    assert message.startswith(f"odd ({kind}): ")
    assert reason in message
    assert way_out in message
    assert message.endswith(".")


@pytest.mark.parametrize("make", [make for make, _, _ in LAYERS.values()], ids=LAYERS.keys())
def test_layer_is_no_trouble_where_it_is_not_selected(make: Callable[[], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature", UserWarning)
        model = with_layer(make())
    hra_fx.transform(model, config("plain"))
    assert [row.path for row in hra_fx.report(model)] == ["plain"]


def test_subclass_without_a_forward_is_adapted() -> None:
    model = hra_fx.transform(with_layer(NamedLinear(6, 6)), config("odd"))
    assert isinstance(model[1], NamedLinear)
    assert type(model[1]).__name__ == "NamedLinear"


@pytest.mark.parametrize(
    ("layer", "width"), [(nn.Linear(4, 9), 4), (nn.Conv2d(6, 6, (1, 3), groups=6), 3)], ids=["Linear", "Conv2d"]
)
def test_more_vectors_than_dimensions(layer: nn.Module, width: int) -> None:
    model = nn.Sequential(layer)
    message = refused(model, config("0", r=width + 1, apply_GS=True))
    assert f"r={width + 1} vectors orthonormal" in message and f"only {width} dimensions" in message
    assert f"Lower r to {width} or less" in message and "apply_GS=False" in message
    hra_fx.transform(model, config("0", r=width + 1))
    hra_fx.transform(hra_fx.fold(model), config("0", r=width, apply_GS=True))


# ---- the model ----


@pytest.mark.parametrize("way", ["cpu_offload", "dispatch_model", "one hook"])
def test_accelerate(way: str) -> None:
    model = mlp()
    if way == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif way == "dispatch_model":
        accelerate.dispatch_model(model, {"0": "cpu", "1": "cpu", "2": "cpu"}, force_hooks=True)
    else:
        accelerate.hooks.add_hook_to_module(model[2], accelerate.hooks.ModelHook())
    message = refused(model, config("0"))
    assert "accelerate dispatches or offloads it by a hook" in message
    assert "accelerate.hooks.remove_hook_from_submodules(model)" in message
    accelerate.hooks.remove_hook_from_submodules(model)
    hra_fx.transform(model, config("0", "2"))


def test_disk_offload(tmp_path: object) -> None:
    model = mlp()
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert "accelerate" in refused(model, config("0"))


def test_peft_adapter_inside() -> None:
    wrapped = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0"]))
    message = refused(wrapped, config("2"))
    assert message.startswith("base_model.model.0: a PEFT adapter is already inside. ")
    assert "merge_and_unload() or unload()" in message
    hra_fx.transform(wrapped.merge_and_unload(), config("0", "2"))


@pytest.mark.parametrize("kind", [peft.HRAConfig, peft.OFTConfig, peft.IA3Config], ids=lambda kind: kind.__name__)
def test_other_peft_adapters(kind: type) -> None:
    fields = {
        peft.HRAConfig: {"r": 2},
        peft.OFTConfig: {"oft_block_size": 2, "r": 0},
        peft.IA3Config: {"feedforward_modules": []},
    }
    wrapped = peft.get_peft_model(mlp(), kind(target_modules=["0"], **fields[kind]))
    assert "a PEFT adapter is already inside" in refused(wrapped, config("2"))


# ---- what must not be refused ----


def test_t5_asks_for_the_dtype_of_a_weight() -> None:
    settings = transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = hra_fx.transform(transformers.T5EncoderModel(settings), config("wo", "wi"))
    assert len(hra_fx.report(model)) == 2


def test_timm_patch_embedding_reads_its_weight_outside_of_forward() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1)
    hra_fx.transform(model, config("patch_embed.proj"))
    assert [row.path for row in hra_fx.report(model)] == ["patch_embed.proj"]


class Asking(nn.Module):
    """Asks of a weight what it is, and uses a weight in a method that forward never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.lin.bias is not None and isinstance(self.lin.weight, Tensor):
            x = x.to(self.lin.weight.dtype).reshape(-1, self.lin.weight.shape[1])
        return self.lin(x)

    def reset(self) -> None:
        nn.init.zeros_(self.lin.weight)


def test_questions_about_a_weight_are_not_reads() -> None:
    hra_fx.transform(Asking(), config("lin"))
