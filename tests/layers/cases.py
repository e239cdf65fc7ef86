"""Models with adapted layers of every kind: called, read by other modules, shared by several paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapting import config
from layers.checking import normal, pair, run_dense
from layers.reading_weights import Reading
from model.many import bert, ids, llama, net
from moe_models import TARGETS, built, call_of
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM
from transformers.pytorch_utils import Conv1D

import hra_fx


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.after = nn.MultiheadAttention(6, 2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.attn(x, x, x, need_weights=False)[0])


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


class Calling(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc, self.after = layer, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.fc(x)))


class TwoPaths(nn.Module):
    """A parent that has and calls a layer by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.between = nn.Linear(6, 6)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.between(torch.tanh(self.first(x)))))


def albert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "embedding_size": 8, "num_attention_heads": 2}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "tie_word_embeddings": False}
    return AlbertForMaskedLM(
        AlbertConfig(vocab_size=32, num_hidden_layers=3, max_position_embeddings=32, **sizes, **still)
    )


@dataclass(frozen=True)
class Case:
    """A model and how it is adapted.

    Attributes:
        make: builds the model.
        targets: the layers of its adapter.
        x: its input, or its keyword arguments.
        others: the layers of a second adapter; those of the first by default.
        sites: the paths of the adapted layers, if a layer has several paths.
        parameters: the parameters of experts in both adapters.
        fields: other fields of the configuration.
    """

    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    x: Any
    others: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call."""
        return ((), self.x) if isinstance(self.x, dict) else ((self.x,), {})

    def config(self, *targets: str, **fields: Any) -> hra_fx.HRAConfig:
        """A configuration for the layers of the adapter, or for others."""
        named = list(targets or self.targets) or None
        return config(**{"target_modules": named, "target_parameters": self.parameters, **fields})

    def pair(self, **fields: Any) -> tuple[Any, Any]:
        """The base model, and an adapted copy with random vectors."""
        return pair(self.make, self.targets, **{"target_parameters": self.parameters, **self.fields, **fields})

    def run(self, model: nn.Module) -> Any:
        args, kwargs = self.call
        return model(*args, **kwargs)

    def dense(self, base: nn.Module, model: nn.Module, *adapters: str) -> Any:
        """The output of the base model with dense weights `W Q`."""
        args, kwargs = self.call
        return run_dense(base, model, *args, adapters=adapters or ("default",), **kwargs)


_ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"
ROWS = normal(1, 4, 6)
#: Layers that are reached more than once.
SHARED = {
    "two paths": Case(TwoPaths, ("first", "between"), ROWS, sites=("first", "between")),
    "albert": Case(
        albert,
        ("query", "ffn", "ffn_output"),
        ids(),
        sites=(f"{_ALBERT}.attention.query", f"{_ALBERT}.ffn", f"{_ALBERT}.ffn_output"),
    ),
}
CASES = {
    "read": Case(lambda: Reading("functional"), ("fc", "after"), ROWS),
    "read, untraced": Case(lambda: Reading("functional", branches=True), ("fc", "after"), ROWS, others=("fc",)),
    "attention": Case(Attending, ("attn", "out_proj", "after"), normal(1, 5, 2, 6), others=("attn",)),
    "own forward": Case(lambda: Calling(Doubling(6, 6)), ("fc", "after"), ROWS),
    "Conv1D": Case(lambda: Calling(Conv1D(6, 6)), ("fc", "after"), ROWS),
    "Conv1d": Case(lambda: Calling(nn.Conv1d(4, 5, 3, padding="same")), ("fc", "after"), normal(1, 2, 4, 6)),
    "Conv2d": Case(lambda: Calling(nn.Conv2d(4, 6, 3, padding=1, groups=2)), ("fc", "after"), normal(1, 2, 4, 5, 6)),
    "Conv3d": Case(lambda: Calling(nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 0, 1))), ("fc",), normal(1, 2, 2, 3, 4, 6)),
    "net": Case(net, ("first", "second"), ROWS, others=("second", "head")),
    "llama": Case(llama, ("q_proj", "gate_proj"), ids(), others=("gate_proj", "down_proj", "lm_head")),
    "bert": Case(bert, ("query", "classifier"), ids(), others=("value", "query", "pooler.dense")),
    **SHARED,
    **{
        name: Case(
            partial(built, name, implementation="eager"),
            (),
            call_of(name),
            others=("q_proj",),
            parameters=tuple(TARGETS),
        )
        for name in ("qwen3_moe", "llama4")  # both layouts of experts
    },
}


def marked(name: str, *values: Any) -> Any:
    """A case with its name, as a parameter of a test."""
    needs = pytest.mark.needs("transformers>=5.6")
    return pytest.param(CASES[name], *values, id=name, marks=needs if CASES[name].parameters else ())
