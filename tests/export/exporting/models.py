"""The models that are exported: tiny, with random weights and adapters that are far from the identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import tiny
import torch
import torchvision
from adapting import config as adapter_config, randomise
from diffusion_pipelines import unet
from torch import Tensor, nn

import hra_fx

BATCH = torch.export.Dim("batch", max=16)
LENGTH = torch.export.Dim("length", max=32)


class One(nn.Module):
    """Calls a model with tensors, and returns one of its outputs."""

    def __init__(self, model: nn.Module, output: str, **settings: object) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.settings = settings

    def forward(self, *inputs: Tensor) -> Any:
        given = self.model(*inputs, **self.settings)
        return getattr(given, self.output) if self.output else given


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        inputs: creates the arguments for (batch, length or height).
        dynamic: the dynamic dimensions of each argument.
        output: the name of the output; "" if the model returns a tensor.
        settings: other arguments.
    """

    build: Callable[[], nn.Module]
    adapter: hra_fx.HRAConfig
    inputs: Callable[[int, int], tuple[Tensor, ...]]
    dynamic: tuple[dict[int, Any], ...]
    output: str = "logits"
    settings: tuple[tuple[str, object], ...] = ()

    def adapted(self) -> One:
        torch.manual_seed(0)
        model = hra_fx.transform(self.build().eval(), self.adapter)
        randomise(model)
        return One(model, self.output, **dict(self.settings)).eval()

    def folded(self) -> One:
        whole = self.adapted()
        hra_fx.fold(whole.model)
        return whole


def ids(batch: int, length: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, tiny.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length)),)


def image(batch: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch)),)


def noised(batch: int, length: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    latents, states = (torch.randn(batch, *shape, generator=generator) for shape in ((4, 8, 8), (length, 16)))
    return latents, torch.arange(batch) * 10.0, states


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


config = partial(adapter_config, r=4)
WORDS = ({0: BATCH, 1: LENGTH},)
MODELS: dict[str, Model] = {
    "OPT": Model(tiny.opt, config("q_proj", "v_proj", "fc1", r=5), ids, WORDS, settings=(("use_cache", False),)),
    "Llama": Model(
        tiny.llama, hra_fx.HRAConfig(r=4, target_modules="all-linear"), ids, WORDS, settings=(("use_cache", False),)
    ),
    "BERT": Model(tiny.bert, config("query", "value", "dense", apply_GS=True), ids, WORDS),
    "T5 encoder": Model(
        partial(tiny.t5, "T5EncoderModel", vocab_size=tiny.VOCABULARY),
        config("q", "v", "wi", "wo"),
        ids,
        WORDS,
        "last_hidden_state",
    ),
    "ResNet": Model(resnet, config("conv1", "conv2", "fc"), image, ({0: BATCH},), ""),
    "ViT": Model(tiny.vit, config("q_proj", "v_proj", "projection"), image, ({0: BATCH},)),
    "UNet": Model(
        unet,
        config("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"),
        noised,
        ({0: BATCH}, {0: BATCH}, {0: BATCH, 1: LENGTH}),
        "sample",
    ),
}
#: (batch, length or height) of the exported call, and of the compared one.
EXPORTED_AT: dict[str, tuple[int, int]] = dict.fromkeys(MODELS, (2, 7)) | {"ResNet": (2, 32), "ViT": (2, 32)}
CALLED_AT: dict[str, tuple[int, int]] = dict.fromkeys(MODELS, (3, 11)) | {"ResNet": (3, 32), "ViT": (3, 32)}
