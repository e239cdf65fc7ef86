"""Layers whose weight another module reads: PEFT's LoRA has no effect there, so an export refuses them by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from layers.test_weight_reads import TARGETS, USES, Reading
from lora.kinds import move
from oracles import relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import SwinTransformer

import hra_fx
from hra_fx import HRAConfig
from hra_fx.errors import UnsupportedLayerError

READ = r"^{}: .* has a weight that another module reads, where PEFT's LoRA has no effect\. Fold the model instead"


def adapted(model: nn.Module, **fields: Any) -> nn.Module:
    move(hra_fx.transform(model, HRAConfig(**{"r": 2, "target_modules": "all-linear"} | fields)), 0)
    return model.eval()


def test_swin_of_torchvision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = SwinTransformer([4, 4], embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=[4, 4], num_classes=5)
    with pytest.raises(UnsupportedLayerError, match=READ.format(r"features\.1\.0\.attn\.qkv")):
        hra_fx.save_as_lora(adapted(copy.deepcopy(base)), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    model, x = adapted(copy.deepcopy(base), exclude_modules=["attn.qkv", "attn.proj"]), torch.randn(1, 3, 32, 32)
    hra_fx.save_as_lora(model, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(base.eval(), tmp_path / "lora")
    assert relative_error(loaded(x), model(x)) < 1e-5


class Parent(nn.Module):
    """Three layers, two of them in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.inner = nn.Linear(6, 6), nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
        self.inner.own = nn.Linear(6, 6)

    @property
    def matrix(self) -> Tensor:
        return self.fc.weight

    def helper(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix) + self.inner["a"](x)


class ByProperty(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)


class Inherited(ByProperty):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OfAnInnerModule(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) @ self.inner.own.weight.T


class Metadata(Parent):
    """Called after all, by a name that the source does not show."""

    def forward(self, x: Tensor) -> Tensor:
        layer = getattr(self, "fc")  # noqa: B009
        return layer(x.to(self.fc.weight.dtype)) if isinstance(self.fc.bias, Tensor) else x


class CalledElsewhere(Parent):
    """In another branch."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight) if len(x) > 1 else self.fc(x)


SOURCES: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "by a property": (ByProperty, "fc"),
    "by an inherited method": (Inherited, "fc"),
    "of an inner module": (OfAnInnerModule, r"inner\.own"),
    "of a part": (lambda: nn.Sequential(nn.Identity(), ByProperty()), r"1\.fc"),
    "metadata": (Metadata, None),
    "called elsewhere": (CalledElsewhere, None),
}


@pytest.mark.parametrize("name", SOURCES)
def test_reads_in_the_source_of_a_model_that_was_not_run(name: str) -> None:
    make, refused = SOURCES[name]
    model = adapted(make())
    if refused is None:
        hra_fx.convert_to_lora(model)
    else:
        with pytest.raises(UnsupportedLayerError, match=READ.format(refused)):
            hra_fx.convert_to_lora(model)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("training", [False, True])
def test_reads_of_the_last_run(use: str, training: bool) -> None:
    model = adapted(Reading(use), target_modules=TARGETS)
    with torch.set_grad_enabled(training):
        model(torch.randn(2, 6))
    with pytest.raises(UnsupportedLayerError, match=READ.format("(fc|before)") + "|is also another"):
        hra_fx.convert_to_lora(copy.deepcopy(model))


def test_a_read_by_the_user_is_none_of_the_model() -> None:
    model: Any = adapted(nn.Sequential(nn.Linear(6, 4), nn.ReLU()))
    model(torch.randn(2, 6))
    assert model[0].weight.norm() > 0 and model[0].weight.detach().sum().isfinite()
    assert hra_fx.convert_to_lora(model)[0]["r"] == 2
