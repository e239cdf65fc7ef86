"""`transform(..., trace=True, example_inputs=...)`: torch.export captures what torch.fx cannot trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers.checking import assert_same, gradients, randomise, vectors_of
from torch import Tensor, fx, nn
from tracing.graph_mode import Branches, X, config

import hra_fx
from hra_fx.errors import AdapterError


def bert() -> tuple[nn.Module, Any, Any]:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids, mask = tokens(), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return (
        BertModel(BertConfig(vocab_size=16, **sizes)),
        {"input_ids": ids, "attention_mask": mask},
        ["query", "output.dense"],
    )


def llama() -> tuple[nn.Module, Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, use_cache=False, **sizes))
    return model, {"input_ids": tokens(), "labels": tokens()}, ["q_proj", "v_proj", "down_proj"]


def t5() -> tuple[nn.Module, Any, Any]:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, use_cache=False))
    return model, {"input_ids": tokens(), "labels": tokens()}, ["q", "v", "wo"]


def tokens() -> Tensor:
    return torch.tensor([[5, 9, 3, 7], [8, 4, 11, 6]])


@pytest.mark.parametrize("make", [bert, pytest.param(llama, marks=pytest.mark.slow), t5])
def test_transformers_are_captured_from_an_example_call(make: Callable[[], tuple[nn.Module, Any, Any]]) -> None:
    torch.manual_seed(0)
    base, example, targets = make()
    base = base.eval()
    message = "Pass example_inputs to capture a call with torch.export, or leave out trace=True"
    with pytest.raises(AdapterError, match=f"torch.fx cannot trace {type(base).__name__}: .*{message}"):
        hra_fx.transform(base, config(*targets), trace=True)
    plain = copy.deepcopy(base)
    eager = hra_fx.transform(copy.deepcopy(base), config(*targets))
    model = hra_fx.transform(base, config(*targets), trace=True, example_inputs=example)
    assert isinstance(model, fx.GraphModule)
    randomise(eager)
    vectors = {name: value for name, value in eager.state_dict().items() if ".hra_u." in name}
    assert {name for name in model.state_dict() if ".hra_u." in name} == vectors.keys()
    model.load_state_dict(vectors, strict=False)
    found, wanted = model(**example), eager(**example)
    assert type(found) is type(wanted)
    name = next(iter(wanted))
    torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
    mine, theirs = ([vectors_of(each)[path] for path in vectors_of(eager)] for each in (model, eager))
    for one, other in zip(gradients(found[name], mine), gradients(wanted[name], theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    folded = hra_fx.fold(model)
    torch.testing.assert_close(folded(**example)[name], wanted[name], rtol=1e-4, atol=1e-5)
    assert not any("hra_u" in key for key in folded.state_dict())
    torch.testing.assert_close(base(**example)[name], plain(**example)[name], rtol=0, atol=0)


def test_a_small_model_is_captured_as_it_is_called() -> None:
    torch.manual_seed(0)
    base = Branches().double().eval()
    model = hra_fx.transform(copy.deepcopy(base), config(), trace=True, example_inputs=X)
    randomise(model)
    eager = hra_fx.transform(copy.deepcopy(base), config())
    assert not any(eager.load_state_dict(model.state_dict(), strict=False))
    assert_same(model(X), eager(X))


def exported() -> Any:
    program = hra_fx.transform(torch.export.export(Branches().double().eval(), (X,)), config())
    return program.module()


def captured() -> Any:
    return hra_fx.transform(Branches().double().eval(), config(), trace=True, example_inputs=X)


FOR_LAYERS: dict[str, Callable[[Any], object]] = {
    "save_adapter": lambda graph: hra_fx.save_adapter(graph, "adapter"),
    "set_scale": lambda graph: hra_fx.set_scale(graph, "default", 0.5),
    "set_adapter": lambda graph: hra_fx.set_adapter(graph, "default"),
    "disable_adapters": hra_fx.disable_adapters,
    "orthogonality_loss": hra_fx.orthogonality_loss,
    "plan_fold": hra_fx.plan_fold,
    "graphs": hra_fx.graphs,
}


@pytest.mark.parametrize("make", [exported, captured])
def test_a_captured_graph_says_what_works_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    graph = make()
    for function in FOR_LAYERS.values():
        message = r"GraphModule is a captured graph, .*load_state_dict\(graph\.state_dict\(\), strict=False\)"
        with pytest.raises(AdapterError, match=message):
            function(graph)
    with pytest.raises(AdapterError, match=r"GraphModule has no adapters\. Call hra_fx\.transform"):
        hra_fx.set_adapter(hra_fx.fold(graph), "default")


def test_the_vectors_of_a_captured_graph_are_saved_from_a_model_without_trace(tmp_path: Path) -> None:
    base = Branches().double().eval()
    eager = hra_fx.transform(copy.deepcopy(base), config())
    graph = hra_fx.transform(copy.deepcopy(base), config(), trace=True, example_inputs=X)
    randomise(graph)
    eager.load_state_dict(graph.state_dict(), strict=False)
    hra_fx.save_adapter(eager, tmp_path)
    assert_same(hra_fx.load_adapter(base, tmp_path)(X), graph(X))


class Optional(nn.Module):
    """A forward with an argument that fx leaves at its default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.layer(x) if scale is None else self.layer(x) * scale


@pytest.mark.parametrize("with_scale", [False, True])
def test_the_graph_is_called_as_in_the_example(with_scale: bool) -> None:
    torch.manual_seed(0)
    base = Optional().double()
    inputs = {"x": torch.randn(3, 6).double()} | ({"scale": torch.randn(6).double()} if with_scale else {})
    settings = hra_fx.HRAConfig(r=2, target_modules=["layer"], init_weights=False)
    graph = hra_fx.transform(copy.deepcopy(base), settings, trace=True, example_inputs=inputs)
    eager = hra_fx.transform(copy.deepcopy(base), settings)
    eager.load_state_dict(graph.state_dict())
    torch.testing.assert_close(graph(**inputs), eager(**inputs), rtol=1e-12, atol=1e-13)
