"""Tiny mixtures of experts of transformers, and the dense oracle for reflections of their experts."""

from __future__ import annotations

from typing import Any

import torch
from oracles import dense_q
from torch import Tensor, nn
from zoo.entry import Entry
from zoo.models import entries

import hra_fx

#: Models of both layouts, and with a loop over experts or with `torch.bmm` (Llama 4).
NAMES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "glm4_moe", "llama4")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def experts_config(**fields: Any) -> hra_fx.HRAConfig:
    """A configuration for the experts."""
    return hra_fx.HRAConfig(**{"r": 2, "target_parameters": TARGETS} | fields)


def entry_of(name: str) -> Entry:
    """The entry of the zoo."""
    return entries()[f"transformers/{name}"]


def built(name: str, dtype: torch.dtype = torch.float64, implementation: str | None = None) -> nn.Module:
    """A tiny model in eval mode, whose experts have weights of the usual size."""
    torch.manual_seed(0)
    model = entry_of(name).build().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.normal_(0, 0.3)
    if implementation is not None:
        model.set_experts_implementation(implementation)  # type: ignore[operator]
    return model


def call_of(name: str) -> dict[str, Any]:
    """The arguments of one call."""
    torch.manual_seed(1)
    return entry_of(name).call(2, 0)[1]


def is_transposed(model: nn.Module, parameter: str) -> bool:
    """Whether the parameter is `(experts, in, out)`."""
    kind = type(model.get_submodule(parameter.rpartition(".")[0])).__name__
    return kind in ("GptOssExperts", "Llama4TextExperts")


def dense_experts(weight: Tensor, vectors: Tensor, transposed: bool, *, apply_GS: bool = False) -> Tensor:
    """`W_e Q_e` of every expert in float64, one dense product after another. Differentiable."""
    rotated = []
    for one, own in zip(weight.double(), vectors, strict=True):
        q = dense_q(own, apply_GS=apply_GS)
        rotated.append(q.T @ one if transposed else one @ q)
    return torch.stack(rotated)
