"""The models that are exported: tiny, with random weights and adapters that are far from the identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
import transformers
from adapting import config as adapter_config, randomise
from diffusion_models import unet
from tiny_models import VOCABULARY, bert, llama
from torch import Tensor, nn

import hra_fx

BATCH = torch.export.Dim("batch", max=16)
LENGTH = torch.export.Dim("length", max=32)
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_attention_heads": 2}
#: Initial weights are ten times the usual ones, so that the outputs of an untrained model depend on its inputs.
WIDE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2}


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
    return (torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length)),)


def image(batch: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch)),)


def noised(batch: int, length: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    latents, states = (torch.randn(batch, *shape, generator=generator) for shape in ((4, 8, 8), (length, 16)))
    return latents, torch.arange(batch) * 10.0, states


def opt() -> nn.Module:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "word_embed_proj_dim": 32, "init_std": 0.2}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SIZES, **sizes))


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=VOCABULARY, **sizes))


def vit() -> nn.Module:
    sizes = WIDE | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


config = partial(adapter_config, r=4)
WORDS = ({0: BATCH, 1: LENGTH},)
MODELS: dict[str, Model] = {
    # An odd rank has an anchor.
    "OPT": Model(opt, config("q_proj", "v_proj", "fc1", r=5), ids, WORDS, settings=(("use_cache", False),)),
    "Llama": Model(
        llama, hra_fx.HRAConfig(r=4, target_modules="all-linear"), ids, WORDS, settings=(("use_cache", False),)
    ),
    "BERT": Model(bert, config("query", "value", "dense", apply_GS=True), ids, WORDS),
    "T5 encoder": Model(t5, config("q", "v", "wi", "wo"), ids, WORDS, "last_hidden_state"),
    "ResNet": Model(resnet, config("conv1", "conv2", "fc"), image, ({0: BATCH},), ""),
    "ViT": Model(vit, config("q_proj", "v_proj", "projection"), image, ({0: BATCH},)),
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
