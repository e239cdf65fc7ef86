"""The models that are measured: their shapes, adapted layers and inputs.

Weights are random. The loss is the mean square of the output, which is the same for every method and cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 1024
USUAL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


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
        first: the layer down to whose output a frozen model runs its backward.
    """

    title: str
    unit: str
    build: Callable[[], nn.Module]
    targets: list[str] | str
    batch: Callable[[int], dict[str, Any]]
    output: Callable[[Any], Tensor]
    first: Callable[[Any], nn.Module]


def llama(width: int, inner: int, heads: int, layers: int, targets: Sequence[str] = USUAL) -> Workload:
    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads}
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes))

    def batch(tokens: int) -> dict[str, Any]:
        ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "use_cache": False}

    return Workload(
        title=f"Llama, d={width}, {layers} layer{'s' * (layers > 1)}{', all projections' * (targets is not USUAL)}",
        unit="tokens",
        build=build,
        targets=list(targets),
        batch=batch,
        output=lambda result: result.logits,
        first=lambda model: model.get_input_embeddings(),
    )


def small_llama(width: int) -> Workload:
    """Two blocks, all of whose projections are adapted."""
    return llama(width, 2 * width, width // 64, 2, (*USUAL, "o_proj", "down_proj"))


def resnet50(pixels: int) -> Workload:
    def build() -> nn.Module:
        import torchvision  # type: ignore[import-untyped]

        model: nn.Module = torchvision.models.resnet50()
        return model

    def batch(images: int) -> dict[str, Any]:
        return {"x": torch.randn((images, 3, pixels, pixels), generator=torch.Generator().manual_seed(0))}

    return Workload(
        title=f"ResNet-50, its 3x3 convolutions, images of {pixels}",
        unit="images",
        build=build,
        targets=r".*\.conv2",
        batch=batch,
        output=lambda result: result,
        first=lambda model: model.conv1,
    )


WORKLOADS: dict[str, Workload] = {
    "llama-768x3": llama(768, 2048, 12, 3),
    "llama-512x2": small_llama(512),
    "llama-2048x2": small_llama(2048),
    "llama-2048x8": llama(2048, 5632, 16, 8),  # for a GPU
    "llama-64x1": llama(64, 128, 4, 1),  # before memory is measured, and with --smoke
    "resnet50": resnet50(224),
}
