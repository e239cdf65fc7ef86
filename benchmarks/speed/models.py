"""The models that are measured: their shapes, adapted layers and inputs.

Weights are random. The loss is the mean square of the output, which is the same for every method and cheap.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 1024


@dataclass(frozen=True)
class Workload:
    """A model and its inputs.

    Attributes:
        title: its name in tables.
        unit: what a size counts.
        build: makes the model.
        targets: what is adapted, as PEFT's `target_modules`.
        batch: the keywords of a call, for a size.
        output: takes the tensor for the loss from the result of a call.
        first: the layer down to whose output a frozen model runs its backward; None if an input requires a gradient.
    """

    title: str
    unit: str
    build: Callable[[], nn.Module]
    targets: list[str] | str
    batch: Callable[[int], dict[str, Any]]
    output: Callable[[Any], Tensor]
    first: Callable[[Any], nn.Module] | None


def _embeddings(model: Any) -> nn.Module:
    layer: nn.Module = model.get_input_embeddings()
    return layer


def _ids(tokens: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def llama(width: int, inner: int, heads: int, layers: int) -> Workload:
    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads}
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes))

    return Workload(
        title=f"Llama, d={width}, {layers} layer{'s' * (layers > 1)}",
        unit="tokens",
        build=build,
        targets=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
        batch=lambda tokens: {"input_ids": _ids(tokens), "use_cache": False},
        output=lambda result: result.logits,
        first=_embeddings,
    )


def bert() -> Workload:
    def build() -> nn.Module:
        from transformers import BertConfig, BertModel

        return BertModel(BertConfig(vocab_size=VOCABULARY, num_hidden_layers=3), add_pooling_layer=False)

    return Workload(
        title="BERT, d=768, 3 layers",
        unit="tokens",
        build=build,
        targets=["query", "key", "value", "dense"],
        batch=lambda tokens: {"input_ids": _ids(tokens)},
        output=lambda result: result.last_hidden_state,
        first=_embeddings,
    )


def vit() -> Workload:
    def build() -> nn.Module:
        from transformers import ViTConfig, ViTModel

        return ViTModel(ViTConfig(num_hidden_layers=3), add_pooling_layer=False)

    return Workload(
        title="ViT, d=768, 3 layers, images of 224",
        unit="images",
        build=build,
        targets="all-linear",
        batch=lambda images: {"pixel_values": _normal(images, 3, 224, 224)},
        output=lambda result: result.last_hidden_state,
        first=_embeddings,
    )


def linear(width: int) -> Workload:
    """A layer in the middle of a model: its input requires a gradient."""
    return Workload(
        title=f"One Linear of {width} x {width}, its input needs a gradient",
        unit="tokens",
        build=lambda: nn.Sequential(OrderedDict(linear=nn.Linear(width, width))),
        targets=["linear"],
        batch=lambda tokens: {"input": _normal(tokens, width).requires_grad_()},
        output=lambda result: result,
        first=None,
    )


def resnet50(pixels: int) -> Workload:
    def build() -> nn.Module:
        import torchvision  # type: ignore[import-untyped]

        model: nn.Module = torchvision.models.resnet50()
        return model

    return Workload(
        title=f"ResNet-50, its 3x3 convolutions, images of {pixels}",
        unit="images",
        build=build,
        targets=r".*\.conv2",
        batch=lambda images: {"x": _normal(images, 3, pixels, pixels)},
        output=lambda result: result,
        first=lambda model: model.conv1,
    )


def unet() -> Workload:
    def build() -> nn.Module:
        import diffusers

        maker: Any = diffusers.UNet2DConditionModel
        model: nn.Module = maker(
            sample_size=32,
            block_out_channels=(128, 256),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=256,
            attention_head_dim=8,
        )
        return model

    def batch(images: int) -> dict[str, Any]:
        text = _normal(images, 77, 256)
        return {"sample": _normal(images, 4, 32, 32), "timestep": 10, "encoder_hidden_states": text}

    return Workload(
        title="UNet as Stable Diffusion's, 128 and 256 channels, latents of 32",
        unit="images",
        build=build,
        targets=["to_q", "to_k", "to_v", "to_out.0"],
        batch=batch,
        output=lambda result: result.sample,
        first=lambda model: model.conv_in,
    )


WORKLOADS: dict[str, Workload] = {
    "llama-768x3": llama(768, 2048, 12, 3),
    "llama-2048x3": llama(2048, 5632, 16, 3),
    "llama-4096x1": llama(4096, 11008, 32, 1),
    "llama-2048x8": llama(2048, 5632, 16, 8),  # for a GPU
    "llama-64x1": llama(64, 128, 4, 1),  # before memory is measured, and with --smoke
    "linear-4096": linear(4096),
    "bert": bert(),
    "vit": vit(),
    "resnet50": resnet50(64),
    "resnet50-224": resnet50(224),
    "unet": unet(),
}
