"""`adapter_names` in `generate`, in compiled models and in layers of other kinds: as each row alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from adapting import randomise
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import AdapterError

NAMES = ["en", "__base__", "fr", "en"]
SIZES = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def llama(layers: int = 2) -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **SIZES))


def t5() -> Any:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**shape, vocab_size=64, decoder_start_token_id=0, eos_token_id=None)
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **SIZES))


TARGETS = {llama: ["q_proj", "v_proj", "down_proj"], t5: ["q", "v"], gpt2: ["c_attn", "c_proj"]}


def adapted(make: Any, kind: type = hra_fx.HRAModel, **sizes: int) -> Any:
    model = make(**sizes).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that adapters change what is generated
            parameter.normal_(std=0.3)
    first = hra_fx.HRAConfig(r=4, target_modules=TARGETS[make])
    model = kind(model, first, "en") if kind is hra_fx.HRAModel else hra_fx.transform(model, first, "en")
    hra_fx.add_adapter(model, "fr", hra_fx.HRAConfig(r=3, target_modules=TARGETS[make][:1], apply_GS=True))
    randomise(model)
    return model


def prompts() -> Tensor:
    return torch.randint(2, 64, (4, 5), generator=torch.Generator().manual_seed(0))


def alone(model: Any, ids: Tensor, **options: Any) -> Tensor:
    found = []
    for row, name in zip(ids.split(1), NAMES, strict=True):
        hra_fx.set_adapter(model, [] if name == "__base__" else name)
        found.append(model.generate(row, **options))
    hra_fx.set_adapter(model, "en")
    return torch.cat(found)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "several beams returned": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize(
    ("make", "way"),
    [(llama, "greedy"), (gpt2, "without a cache"), (t5, "beams"), (llama, "several beams returned")],
    ids=["greedy", "without a cache", "beams", "several beams returned"],
)
def test_generated_tokens(make: Any, way: str) -> None:
    model, ids = adapted(make, nn.Module if way == "greedy" else hra_fx.HRAModel), prompts()
    options = {"max_new_tokens": 6, "do_sample": False, **WAYS[way]}
    wanted = alone(model, ids, **options)
    base = model.generate(ids, **options)
    found = model.generate(ids, adapter_names=NAMES, **options)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, base)
    assert torch.equal(model.generate(ids, **options), base)


def test_beams_of_the_generation_config_and_a_block() -> None:
    model, ids = adapted(llama), prompts()
    wanted = alone(model, ids, max_new_tokens=4, num_beams=2, do_sample=False)
    model.generation_config.num_beams = 2
    with hra_fx.mixed_batch(model, NAMES):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), wanted)
    given = transformers.GenerationConfig(num_beams=2, max_new_tokens=4, pad_token_id=0)
    assert torch.equal(model.generate(ids, generation_config=given, adapter_names=NAMES), wanted)


def test_compiled_models() -> None:
    model, ids = adapted(llama, layers=1), prompts()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def logits(**options: Any) -> Tensor:
        return compiled(input_ids=ids, use_cache=False, **options).logits

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    lists = (NAMES, ["fr", "en", "__base__", "en"])
    with torch.no_grad():
        wanted = [model(input_ids=ids, use_cache=False, adapter_names=names).logits for names in lists]
        for names, expected in zip(lists, wanted, strict=True):
            with hra_fx.mixed_batch(model, names):
                torch.testing.assert_close(logits(), expected, rtol=1e-9, atol=1e-9)
        assert len(graphs) == 1  # for other rows with the same adapters
        for names, expected in zip(lists, wanted, strict=True):
            torch.testing.assert_close(logits(adapter_names=names), expected, rtol=1e-9, atol=1e-9)
        plain = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits(), plain, rtol=1e-9, atol=1e-9)


class Experts(nn.Module):
    """Each token goes to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        chosen = flat[:, 0] > 0
        output = torch.zeros_like(flat)
        for expert, rows in zip(self.experts, (chosen, ~chosen), strict=True):
            output[rows] = expert(flat[rows])
        return output.view(x.shape)


def test_experts_are_refused() -> None:
    model = hra_fx.transform(Experts(), hra_fx.HRAConfig(target_modules="all-linear"), "en").eval()
    with pytest.raises(AdapterError, match=r"^experts\.0: adapter_names has 3 names.* Layers with inputs other than"):
        model(torch.randn(3, 5, 4), adapter_names=["en"] * 3)
