"""Layers and models that cannot be adapted: the message, and that the model is unchanged; and what is supported."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from adapting import config
from refusals import mlp, refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import hra_fx
from hra_fx.errors import UnsupportedLayerError

# ---- the layer itself ----


class OwnCall(nn.Linear):
    """Bypasses forward."""

    def __call__(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


def with_layer(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(plain=nn.Linear(6, 6), odd=layer))


def with_instance_forward() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.forward = lambda x: x
    return layer


def with_old_tp_plan() -> nn.Module:
    layer: Any = nn.Linear(6, 6)
    layer._hf_tp_plan = "colwise"  # as transformers 5.0 to 5.15 sets it
    return layer


def with_weight(weight: Tensor) -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Marked(Tensor):
    """A tensor subclass, such as a quantized or distributed one is."""


#: name -> (layer, reason, what to do)
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "instance forward": (with_instance_forward, "its `forward` is set on the instance", "Delete it, or exclude"),
    "old tp_plan": (with_old_tp_plan, "splits it without DTensor", "Use transformers 5.16 or later"),
    "own call": (lambda: OwnCall(6, 6), "its class overrides `__call__`", "`exclude_modules`"),
    "LazyLinear": (lambda: nn.LazyLinear(6), "not initialized", "Run the model once first"),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
        "its `weight` is computed from other parameters in each call, so it cannot be folded. ",
        "remove_parametrizations",
    ),
    "orthogonal, attention": (
        lambda: parametrizations.orthogonal(nn.MultiheadAttention(6, 2), "in_proj_weight"),
        "its `in_proj_weight` is computed from other parameters",
        "remove_parametrizations",
    ),
    "attention of several widths": (
        lambda: nn.MultiheadAttention(6, 2, vdim=4),
        "its `kdim` or `vdim` differs from `embed_dim`",
        "target its `out_proj`",
    ),
    "int8": (lambda: with_weight(torch.ones(6, 6, dtype=torch.int8)), "got torch.int8", "Exclude the layer"),
    "subclass": (
        lambda: with_weight(torch.ones(6, 6).as_subclass(Marked)),
        "its weight must be a plain floating-point tensor, got Marked",
        "Exclude the layer",
    ),
    "packed": (lambda: with_weight(torch.ones(18, 2)), "must have shape (6, 6), got (18, 2)", "Exclude the layer"),
}


@pytest.mark.parametrize(("make", "reason", "fix"), LAYERS.values(), ids=LAYERS.keys())
def test_layer_is_refused(make: Callable[[], nn.Module], reason: str, fix: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature", UserWarning)
        model = with_layer(make())
    kind = type(model[1]).__name__
    message = refused(model, config("plain", "odd"))
    assert message.startswith(f"odd ({kind}): ")
    assert reason in message
    assert fix in message
    assert message.endswith(".")


def test_an_unsupported_layer_that_is_not_selected_is_ignored() -> None:
    model = with_layer(LAYERS["weight_norm"][0]())
    hra_fx.transform(model, config("plain"))
    assert [row.path for row in hra_fx.report(model)] == ["plain"]


@pytest.mark.parametrize(
    ("layer", "width"), [(nn.Linear(4, 9), 4), (nn.Conv2d(6, 6, (1, 3), groups=6), 3)], ids=["Linear", "Conv2d"]
)
def test_more_vectors_than_dimensions(layer: nn.Module, width: int) -> None:
    message = refused(nn.Sequential(layer), config("0", r=width + 1, apply_GS=True))
    assert f"with `apply_GS=True`, `r` must be at most {width}, the input dimension of the layer" in message
    assert f"got {width + 1}. Lower `r`, set `apply_GS=False`" in message


# ---- the model ----


def test_peft_adapter_inside() -> None:
    wrapped = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0"]))
    message = refused(wrapped, config("2"))
    assert message.startswith("base_model.model.0: it already has a PEFT adapter. ")
    assert "`merge_and_unload()` or `unload()`" in message
    hra_fx.transform(wrapped.merge_and_unload(), config("0", "2"))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["torch.compile", "DataParallel"])
@pytest.mark.parametrize("use", ["transform", "load_adapter"])
def test_a_wrapper_that_renames_parameters_comes_after(wrap: Any, use: str, tmp_path: Path) -> None:
    settings = hra_fx.HRAConfig(r=2, target_modules=["0"])
    hra_fx.save_adapter(hra_fx.transform(nn.Sequential(nn.Linear(6, 4)), settings), tmp_path)
    argument = tmp_path if use == "load_adapter" else settings
    name = "DataParallel" if wrap is nn.DataParallel else r"torch\.compile"
    with pytest.raises(UnsupportedLayerError, match=f"^the model: {name} adds a prefix .* Adapt the model first, then"):
        getattr(hra_fx, use)(wrap(nn.Sequential(nn.Linear(6, 4))), argument)


def test_a_compiled_part_only_matters_around_adapted_layers() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(torch.compile(nn.Sequential(nn.Linear(6, 6))), nn.Linear(6, 4))

    hra_fx.transform(model(), hra_fx.HRAConfig(r=2, target_modules=["1"]))
    with pytest.raises(UnsupportedLayerError, match=r"^0: torch\.compile adds a prefix"):
        hra_fx.transform(model(), hra_fx.HRAConfig(r=2, target_modules=["0._orig_mod.0"]))
