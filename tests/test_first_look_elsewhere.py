"""The first look under other modes, threads, traces and compilers, in models of transformers, and in HRAModel."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from integrations.transformers_use import tiny
from layers.checking import assert_same, check, normal, randomise, run_dense
from torch import Tensor, fx, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from unseen import CONFIG, Alias, Asking, Untraceable, X, adapted

import hra_fx
from hra_fx.errors import UnsupportedLayerError
from hra_fx.model.state import record_of


def contexts() -> Iterator[Any]:
    yield "no_grad", torch.no_grad
    yield "inference_mode", torch.inference_mode
    yield "device", lambda: torch.device("cpu")
    yield "anomaly", torch.autograd.detect_anomaly
    yield "autocast", lambda: torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize(("name", "context"), list(contexts()), ids=[name for name, _ in contexts()])
@pytest.mark.parametrize("make", [Asking, Alias])
def test_under_other_modes(name: str, context: Any, make: Any) -> None:
    base, model = adapted(make())
    with context():
        if make is Alias:
            with pytest.raises(UnsupportedLayerError):
                model(X)
            return
        assert_same(model(X), run_dense(base, model, X), rtol=2e-2 if name == "autocast" else 1e-10)


def test_copies_pickles_and_replicas() -> None:
    base, model = adapted(Asking())
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        replica._modules[name] = child
    for twin in (replica, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert_same(twin(X), run_dense(base, model, X))


def test_first_forwards_of_several_threads() -> None:
    base, model = adapted(Asking())
    with torch.no_grad():
        expected = run_dense(base, model, X)
    for _ in range(5):
        record_of(model).looked.clear()
        results: list[Any] = []

        def run(results: list[Any] = results) -> None:
            try:
                results.append(model(X).detach())
            except Exception as error:
                results.append(error)

        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            assert isinstance(result, Tensor), result
            assert_same(result, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("first", [True, False], ids=["before the first look", "after it"])
def test_jit_trace(first: bool) -> None:
    base, model = adapted(Asking())
    model.eval()
    if not first:
        model(X)
    traced = torch.jit.trace(model, (X,))
    other = normal(9, 3, 6)
    assert_same(traced(other), run_dense(base.eval(), model, other))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_torch_compile() -> None:
    torch.compiler.reset()
    base, model = adapted(Untraceable())
    compiled = torch.compile(model, backend="eager")
    assert_same(compiled(X), run_dense(base, model, X))
    assert record_of(model).looked == set() and model.modes == 0
    assert_same(model(X), run_dense(base, model, X))
    torch.compiler.reset()


def test_scripted_parts() -> None:
    class Scripted(Untraceable):
        def __init__(self) -> None:
            super().__init__()
            self.reader = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double())  # type: ignore[assignment]

        def extra(self, x: Tensor) -> Tensor:
            return self.reader(x)

    torch.manual_seed(0)
    with pytest.warns(DeprecationWarning):
        model = Scripted().double()
    hra_fx.transform(model, CONFIG)
    randomise(model)
    found = model(X)
    assert_same(found, model(X))
    assert record_of(model).looked == {True}


def test_a_graph_module_inside_that_reads_the_weight_of_its_own_layer() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.first(x), self.first.weight)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fx.symbolic_trace(Both())
            self.second = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.inner(x)) if float(x.detach().sum()) < 1e9 else x

    _, model = adapted(Holder())
    with pytest.raises(UnsupportedLayerError, match=r"inner.first: inner \(GraphModule, in linear\) reads its weight"):
        model(X)
    base, model = adapted(Holder(), example_inputs=X)
    check(base, model, X)


def t5(**fields: Any) -> Any:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, **fields))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32))


MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "bert": (tiny.bert, ["query", "value", "dense", "classifier"]),
    "llama": (tiny.llama, ["q_proj", "o_proj", "down_proj", "lm_head"]),
    "tied llama": (lambda: tiny.llama(tie_word_embeddings=True), ["q_proj", "lm_head"]),
    "t5": (t5, ["q", "wi", "wo", "lm_head"]),
    "t5 gated": (lambda: t5(feed_forward_proj="gated-gelu"), ["wi_0", "wo"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "lm_head"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_and_their_generate(name: str) -> None:
    make, targets = MODELS[name]
    torch.manual_seed(0)
    base = make().double().eval()
    model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=2, target_modules=targets))
    randomise(model)
    ids = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, **({"decoder_input_ids": ids} if "t5" in name else {})}
    with torch.no_grad():
        assert_same(model(**call).logits, run_dense(base, model, **call).logits, rtol=1e-6)
    if name != "bert":
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.train()(**call).logits.sum().backward()
    assert record_of(model).looked == {True, False}


def test_gradient_checkpointing_of_transformers() -> None:
    model = tiny.llama()
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.activation_checkpointing_enable()
    model.train()(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert record_of(model).looked == {True}
    assert all(p.grad is not None for name, p in model.named_parameters() if "hra_u" in name)


def test_hra_model_watches_too() -> None:
    wrapped = hra_fx.HRAModel(Alias().double(), CONFIG)
    with pytest.raises(UnsupportedLayerError, match=r"first: the model \(Alias, in linear\) reads its weight"):
        wrapped(X)
    plain = wrapped.unload()
    again = hra_fx.transform(plain, CONFIG, example_inputs=X)
    assert torch.isfinite(again(X)).all()
