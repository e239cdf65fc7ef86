"""`mixed_batch` and `adapter_names`: each row of a batch computes, and generates, what it does alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from adapting import randomise
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import AdapterError

F64 = torch.float64


class Net(nn.Module):
    """Convolutions of several kinds, then linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(6, 4, (3, 1), groups=2, padding="same", dilation=2, padding_mode="circular")
        self.line = nn.Conv1d(4, 4, 3, padding=1)
        self.one = nn.Linear(4, 8)
        self.two = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.conv(x)))).flatten(2)
        x = torch.tanh(self.one(self.line(x).mT))
        return self.two(x)


EVERY = ["conv", "grouped", "line", "one", "two"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "even": {"r": 4},
    "odd": {"r": 3, "target_modules": ["conv", "one"]},
    "orthonormal": {"r": 2, "apply_GS": True},
    "wide": {"r": 6, "target_modules": ["two", "grouped"], "init_weights": False},
    "weak": {"r": 2, "rank_pattern": {"two": 4}},
    "off": {"r": 2},
}


def config(**fields: Any) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**{"target_modules": EVERY, **fields})


def net(dtype: torch.dtype = F64) -> Any:
    torch.manual_seed(0)
    model: Any = Net().to(dtype)
    for place, (name, fields) in enumerate(ADAPTERS.items()):
        if place:
            hra_fx.add_adapter(model, name, config(**fields))
        else:
            hra_fx.transform(model, config(**fields), name)
    randomise(model)
    hra_fx.set_scale(model, "weak", 0.4)
    hra_fx.set_scale(model, "off", 0)
    return model.eval()


def inputs(rows: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(rows, 4, 8, 7, dtype=dtype, generator=torch.Generator().manual_seed(rows))


def alone(model: Any, x: Tensor, names: list[str], call: Any = None) -> Tensor:
    """Call the model (or `call`) with each row alone, with its adapter active."""
    outputs = []
    for row, name in zip(x.split(1), names, strict=True):
        hra_fx.set_adapter(model, [] if name == "__base__" else name, inference_mode=True)
        outputs.append((call or model)(row))
    hra_fx.set_adapter(model, next(iter(model._hra_record.configs)))
    return torch.cat(outputs)


NAMES: list[list[str]] = [
    [*ADAPTERS, "__base__"],
    ["odd", "__base__", "odd", "even", "orthonormal", "__base__", "weak"],
    ["wide"] * 3,
]


@pytest.mark.parametrize("names", NAMES, ids=len)
@pytest.mark.parametrize("grad", [False, True])
def test_rows_compute_what_they_do_alone(names: list[str], grad: bool) -> None:
    model, x = net(), inputs(len(names))
    wanted = alone(model, x, names)
    with torch.set_grad_enabled(grad):
        before = model(x)
        with hra_fx.mixed_batch(model, names):
            mixed = model(x)
        torch.testing.assert_close(mixed, wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(x, adapter_names=tuple(names)), wanted, rtol=1e-9, atol=1e-9)
        assert torch.equal(model(x), before)


def test_parts_of_a_model_in_a_block() -> None:
    """Layers outside of their model's forward compute their own factors."""
    model, names = net(), ["even", "__base__", "odd"]
    x = torch.randn(3, 5, 4, dtype=F64)
    wanted = alone(model, x, names, model.one)
    with hra_fx.mixed_batch(model, names):
        torch.testing.assert_close(model.one(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_and_autocast(dtype: torch.dtype) -> None:
    model, names = net(torch.float32), ["even", "odd", "__base__", "odd"]
    x = inputs(4, torch.float32)
    wanted = alone(model, x, names)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        mixed = model(x, adapter_names=names)
    assert mixed.dtype is dtype
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(mixed.float(), wanted, rtol=tolerance, atol=tolerance)


def test_disabled_adapters_are_the_base_model() -> None:
    model, x = net(), inputs(2)
    with hra_fx.disable_adapters(model):
        wanted = model(x)
        torch.testing.assert_close(model(x, adapter_names=["even", "odd"]), wanted, rtol=1e-9, atol=1e-9)
    with hra_fx.mixed_batch(model, ["even", "odd"]), hra_fx.disable_adapters(model):
        torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


def test_threads_have_batches_of_their_own() -> None:
    model, x = net(), inputs(2)
    lists = [["even", "odd"], ["odd", "weak"], ["__base__", "wide"]]
    wanted = [alone(model, x, names) for names in lists]
    inside = threading.Barrier(3)

    def run(names: list[str]) -> Tensor:
        with torch.no_grad(), hra_fx.mixed_batch(model, names):
            inside.wait()
            output: Tensor = model(x)
            inside.wait()
            return output

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, lists))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_blocks_in_blocks_and_after_an_error() -> None:
    model, x = net(), inputs(2)
    plain = model(x)
    outer = alone(model, x, ["even", "odd"])
    with hra_fx.mixed_batch(model, ["even", "odd"]):
        with pytest.raises(ZeroDivisionError), hra_fx.mixed_batch(model, ["odd", "odd"]):
            1 / 0  # noqa: B018
        torch.testing.assert_close(model(x), outer, rtol=1e-9, atol=1e-9)
    assert torch.equal(model(x), plain)


class Reading(nn.Module):
    """Reads the weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert self.one.weight.dtype is x.dtype
        return nn.functional.linear(x, self.one.weight) + self.two(x)


def test_a_weight_that_is_read() -> None:
    model: Any = hra_fx.transform(Reading(), hra_fx.HRAConfig(target_modules=["one"]), "a").eval()
    hra_fx.add_adapter(model, "b", hra_fx.HRAConfig(target_modules=["two"]))
    x = torch.ones(2, 4)
    text = r"^one: adapters \['a'\] are on this layer, but its weight is read"
    for guard in (torch.no_grad, torch.enable_grad):
        with guard(), pytest.raises(AdapterError, match=text):
            model(x, adapter_names=["a", "b"])
    found = model(x, adapter_names=["b", "b"])
    hra_fx.set_adapter(model, "b")
    torch.testing.assert_close(found, model(x))


def refused(model: Any, names: Any, x: Tensor | None = None) -> str:
    with pytest.raises(AdapterError) as error:
        model(inputs(2) if x is None else x, adapter_names=names)
    return str(error.value)


def test_names_that_do_not_fit() -> None:
    model = net()
    assert refused(model, ["even", "evn"]).startswith("the model has no adapter 'evn'. It has 'even', 'odd', ")
    wrong = "adapter_names must be a list with one name per row of the batch, got "
    for given in ("even", [], [1, 2]):
        assert refused(model, given) == f"{wrong}{given!r}."
    text = (
        "conv: adapter_names has 3 names, so the first dimension of the layer's input must be 3, got an input of shape "
        "(2, 4, 8, 7). Pass one name per row of the batch. "
    )
    assert refused(model, ["even"] * 3).startswith(text)
    with hra_fx.mixed_batch(model, ["even"] * 4), pytest.raises(AdapterError, match=r"^one: .* got an input of shape"):
        model.one(torch.ones(4, dtype=F64))
    with hra_fx.mixed_batch(model, ["even"] * 4), pytest.raises(AdapterError, match=r"^conv: .* \(4, 8, 7\)"):
        model.conv(inputs(1)[0])


def test_models_without_mixed_batches() -> None:
    text = "A mixed batch is for inference, but the model is in training mode. Call model.eval() first."
    assert refused(net().train(), ["even", "odd"]) == text
    model = net()
    hra_fx.merge_adapter(model)
    assert refused(model, ["even", "odd"]).startswith("adapters ['even'] are merged into the weights.")
    with pytest.raises(AdapterError, match="has no adapters"):
        hra_fx.mixed_batch(nn.Linear(3, 3), ["a"]).__enter__()
    encoder: Any = nn.MultiheadAttention(8, 2)
    encoder = hra_fx.transform(nn.ModuleDict({"mix": encoder}), hra_fx.HRAConfig(target_modules=["mix"]), "a").eval()
    with pytest.raises(
        AdapterError, match=r"^mix \(MultiheadAttention\): adapters \['a'\] change the weight of this layer"
    ):
        hra_fx.mixed_batch(encoder, ["a", "__base__"]).__enter__()


@pytest.mark.parametrize("fields", [{"modules_to_save": ["two"]}, {"bias": "hra_only"}], ids=str)
def test_trained_copies(fields: dict[str, Any]) -> None:
    model: Any = hra_fx.transform(Net(), config(target_modules=["one"], **fields), "own").double()
    hra_fx.add_adapter(model, "plain", config(target_modules=["one"]))
    model.eval()
    randomise(model)
    entry = "two.weight" if "modules_to_save" in fields else "one.bias"
    assert refused(model, ["own", "plain"]) == (
        f"{entry}: the copy in use is that of adapter 'own', but rows of 'plain' need another copy "
        "(modules_to_save or bias). All rows of a batch share one copy: run these rows in a separate batch."
    )
    x = inputs(2)
    torch.testing.assert_close(model(x, adapter_names=["own", "own"]), model(x), rtol=1e-9, atol=1e-9)
    hra_fx.set_adapter(model, "plain")
    assert refused(model, ["own", "plain"]).startswith(
        f"{entry}: the copy in use is that of the base model, but rows of 'own'"
    )
    model(x, adapter_names=["plain", "__base__"])


def test_vectors_without_data() -> None:
    model = net()
    hra_fx.add_adapter(model, "empty", config(r=2), low_cpu_mem_usage=True)
    assert "the vectors of empty are on the meta device" in refused(model, ["even", "empty"])


def test_blocks_of_two_models_are_not_nested() -> None:
    one, two = net(), net()
    with (
        hra_fx.mixed_batch(one, ["even", "__base__"]),
        pytest.raises(hra_fx.AdapterError, match=r"^a mixed batch of another model is open\. Close that"),
    ):
        hra_fx.mixed_batch(two, ["even", "__base__"]).__enter__()


# ---- models that are compiled, and `generate` ----

ROWS = ["en", "__base__", "fr", "en"]
SIZES = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def two(model: Any, targets: list[str], kind: Any = hra_fx.transform) -> Any:
    """The model with the adapters "en" and "fr"."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that adapters change what is generated
            parameter.normal_(std=0.3)
    model = kind(model, hra_fx.HRAConfig(r=4, target_modules=targets), "en")
    hra_fx.add_adapter(model, "fr", hra_fx.HRAConfig(r=3, target_modules=targets[:1], apply_GS=True))
    randomise(model)
    return model


@pytest.mark.needs("torch>=2.9")
def test_compiled_models() -> None:
    torch._dynamo.reset()
    model = two(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)), ["0", "2"])
    x, graphs = torch.randn(4, 6, dtype=F64), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for names in (ROWS, ["fr", "en", "__base__", "en"]):
            wanted = alone(model, x, names)
            with hra_fx.mixed_batch(model, names):
                torch.testing.assert_close(compiled(x), wanted, rtol=1e-9, atol=1e-9)
        assert len(graphs) == 1  # for other rows with the same adapters
        found = compiled(x, adapter_names=ROWS)
        torch.testing.assert_close(found, alone(model, x, ROWS), rtol=1e-9, atol=1e-9)


def llama() -> Any:
    return two(tiny_models.llama(**SIZES), ["q_proj", "v_proj", "down_proj"])


def t5() -> Any:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**shape, vocab_size=64, decoder_start_token_id=0, eos_token_id=None)
    return two(transformers.T5ForConditionalGeneration(config), ["q", "v"], hra_fx.HRAModel)


def gpt2() -> Any:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **SIZES))
    return two(model, ["c_attn", "c_proj"], hra_fx.HRAModel)


WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "greedy": (llama, {}),
    "without a cache": (gpt2, {"use_cache": False}),
    "beams": (t5, {"num_beams": 3}),
    "several beams returned": (llama, {"num_beams": 3, "num_return_sequences": 2}),
}


def prompts() -> Tensor:
    return torch.randint(2, 64, (4, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("way", WAYS)
def test_generated_tokens(way: str) -> None:
    make, more = WAYS[way]
    model, ids = make(), prompts()
    generate = partial(model.generate, max_new_tokens=6, do_sample=False, **more)
    wanted = alone(model, ids, ROWS, generate)
    base = generate(ids)
    found = generate(ids, adapter_names=ROWS)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, base)
    assert torch.equal(generate(ids), base)


def test_beams_of_the_generation_config_and_a_block() -> None:
    model, ids = llama(), prompts()
    wanted = alone(model, ids, ROWS, partial(model.generate, max_new_tokens=4, num_beams=2, do_sample=False))
    model.generation_config.num_beams = 2
    with hra_fx.mixed_batch(model, ROWS):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), wanted)
    given = transformers.GenerationConfig(num_beams=2, max_new_tokens=4, pad_token_id=0)
    assert torch.equal(model.generate(ids, generation_config=given, adapter_names=ROWS), wanted)
