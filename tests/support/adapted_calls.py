"""Models that torch.fx cannot trace, and the check of the graphs that torch.export captures of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hra_fx

TOKENS = torch.tensor([[5, 9, 3, 7], [8, 4, 11, 6]])
SMALL = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1}


class Branching(nn.Module):
    """fx cannot trace it, because it branches on a shape. It has every kind of adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        if x.shape[0] > 100:
            x = x[:100]
        rows = self.norm(self.conv(x)).flatten(2).mT
        read, _ = self.attention(rows, rows, rows, need_weights=False)
        return {"again": self.head(read), "rows": self.drop(self.head(scale * rows))}


def adapted(model: nn.Module, targets: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = hra_fx.transform(model, hra_fx.HRAConfig(**({"r": 2, "target_modules": targets} | fields)))
    return turned(model)


def turned(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".hra_u." in name:
                parameter.normal_()
    return model


def branching(**fields: Any) -> Any:
    torch.manual_seed(1)
    return adapted(Branching().double().eval(), ["conv", "attention", "attention.out_proj", "head"], **fields)


def image() -> Tensor:
    return torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def run(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def reflections_in(graph: fx.GraphModule) -> Counter[str]:
    """How many nodes reflect the input or the weight of each layer."""
    notes = [node.meta["hra"] for node in graph.graph.find_nodes(op="call_module") if "hra" in node.meta]
    return Counter(note.path for note in notes if note.role == "reflection")


def gradients(outputs: list[Tensor], model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    sum(output.float().pow(2).sum() for output in outputs).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_call(model: nn.Module, inputs: Any) -> fx.GraphModule:
    """The graph of a call, in float64: it computes what the model does, with the same gradients and parameters."""
    model.double()
    found = hra_fx.graphs(model, inputs)
    assert list(found) == [""]
    graph = found[""]
    torch.manual_seed(5)
    wanted = tensors_in(run(model, inputs))
    wanted_gradients = gradients(wanted, model)
    torch.manual_seed(5)
    given = tensors_in(run(graph, inputs))
    # Without the cache that a language model returns.
    assert 0 < len(given) <= len(wanted)
    for one, other in zip(given, wanted, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    found_gradients = gradients(given, model)
    assert found_gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-9, atol=1e-9)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    shared = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    assert all(own[name] is tensor for name, tensor in shared.items() if name in own)
    assert {name for name, _ in model.named_parameters()} <= shared.keys()
    graph.graph.lint()
    return graph


def llama() -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    return adapted(LlamaForCausalLM(LlamaConfig(**(SMALL | heads | {"num_hidden_layers": 2}))), "all-linear")


def bert() -> nn.Module:
    model = BertForSequenceClassification(BertConfig(**SMALL, num_attention_heads=2, intermediate_size=32))
    return adapted(model, "all-linear").train()


def t5() -> nn.Module:
    settings = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return adapted(T5ForConditionalGeneration(T5Config(**settings, decoder_start_token_id=2)).eval(), ["q", "v", "wo"])


def gpt2() -> nn.Module:
    settings = {"vocab_size": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    return adapted(GPT2LMHeadModel(GPT2Config(**settings)).eval(), ["c_attn", "c_proj", "c_fc"])


def mamba() -> nn.Module:
    model = MambaForCausalLM(MambaConfig(**SMALL, state_size=2)).eval()
    return adapted(model, ["in_proj", "x_proj", "dt_proj", "out_proj", "conv1d"])
