"""Models to trace with TorchDynamo, and the checks of their graphs."""

from __future__ import annotations

import copy
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
from hra_fx.model.state import adapted_layers

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


class Broken(Branching):
    """A graph break between the norm and the rest."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.conv(x if x.shape[0] < 100 else x[:100]))
        torch._dynamo.graph_break()
        return self.head(self.drop(hidden.mean((2, 3))))


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
    return adapted(Branching().eval(), ["conv", "attention", "attention.out_proj", "head"], **fields)


def image() -> Tensor:
    return torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(3))


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def run(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def calls_of(model: nn.Module, inputs: Any) -> Counter[str]:
    """How often the reflection of each layer is called, counted by hooks."""
    calls: Counter[str] = Counter()
    hooked = copy.deepcopy(model)
    for path, layer in adapted_layers(hooked).items():
        layer.hra_u.register_forward_pre_hook(lambda *_, path=path: calls.update([path]))  # type: ignore[misc]
    run(hooked, inputs)
    return calls


def reflections_in(*graphs: fx.GraphModule) -> Counter[str]:
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    return Counter(
        node.meta["hra"].path for node in nodes if "hra" in node.meta and node.meta["hra"].role == "reflection"
    )


def gradients(outputs: list[Tensor], model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    sum(output.float().pow(2).sum() for output in outputs).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_whole(model: nn.Module, inputs: Any) -> fx.GraphModule:
    """Check the graph of a whole model."""
    found = hra_fx.graphs(model, inputs)
    assert list(found) == [""]
    graph = found[""]
    assert reflections_in(graph) == calls_of(model, inputs)
    torch.manual_seed(5)
    wanted = tensors_in(run(model, inputs))
    wanted_gradients = gradients(wanted, model)
    torch.manual_seed(5)
    given = graph(*tensors_in(inputs))
    assert len(given) == len(wanted) > 0
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    found_gradients = gradients(list(given), model)
    assert found_gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-5)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    shared = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    assert all(own[name] is tensor for name, tensor in shared.items())
    assert {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"} == shared.keys()
    paths = {path for path, _ in model.named_modules()}
    stacks = [node.meta["nn_module_stack"] for node in graph.graph.nodes if "nn_module_stack" in node.meta]
    assert {path for stack in stacks for path, _ in stack.values()} <= paths
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
