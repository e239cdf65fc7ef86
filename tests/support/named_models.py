"""Small models to select layers in: one with difficult names, the others from transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import tiny
import torch
from torch import nn


class Block(nn.Module):
    """Names that are suffixes of each other (q, seq, proj.q), numbered experts, other layer types."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.seq = nn.Linear(4, 4)
        self.proj = nn.ModuleDict({"q": nn.Linear(4, 4), "conv": nn.Conv2d(4, 4, 3)})
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4), "q": nn.Linear(4, 4)}) for _ in range(2))
        self.norm = nn.LayerNorm(4)


class Nested(nn.Module):
    """Two module lists, layers at the root, a shared block, and a name that is a regex."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.embed = nn.Embedding(5, 4)
        self.stem = nn.Conv2d(4, 4, 1)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.encoder = nn.ModuleDict({"h": nn.ModuleList(Block() for _ in range(2))})
        self.encoder["again"] = self.layers[1]
        self.tower = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1)))
        self.head = nn.Linear(4, 2)
        self.sub_head = nn.Linear(4, 2)
        self.add_module("w+", nn.Linear(4, 4))


SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 11}
tiny_bert = partial(tiny.bert, **SMALL)
tiny_llama = partial(tiny.llama, **SMALL)
tiny_opt = partial(tiny.opt, hidden_size=8, ffn_dim=16, word_embed_proj_dim=8, vocab_size=11, num_hidden_layers=3)
tiny_vit = partial(tiny.vit, hidden_size=8, intermediate_size=16, image_size=8, patch_size=4)
MAKERS: list[Callable[[], nn.Module]] = [
    Nested,
    tiny_bert,
    partial(tiny.bert, "RobertaForSequenceClassification", **SMALL, pad_token_id=1),
    tiny_opt,
    tiny.t5,
    tiny_llama,
    partial(tiny.llama, "LlamaForSequenceClassification", **SMALL),
    tiny_vit,
    tiny.gpt2,
]


@cache
def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Build each model once. Tests must not change it (PEFT gets a copy)."""
    torch.manual_seed(0)
    return make().requires_grad_(False)
