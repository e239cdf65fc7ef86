"""The first forward in each mode is watched: a weight that is read unseen raises, and nothing else does."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from refusals import picture
from sites.checking import assert_same, check, normal, randomise, run_dense
from torch import Tensor, fx, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers_use import tiny

import hra_fx
from hra_fx.adapted import record_of
from hra_fx.errors import UnsupportedLayerError
from hra_fx.overlooked import WeightWatch

X = normal(3, 4, 6)
CONFIG = hra_fx.HRAConfig(r=3, target_modules=["first", "second"])


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """A helper outside of every module."""
    return x @ weight.mT


class Reader(nn.Module):
    """A module that gets a layer at its call."""

    def forward(self, x: Tensor, given: nn.Linear) -> Tensor:
        return nn.functional.linear(x, given.weight)


class Untraceable(nn.Module):
    """Two layers 6 -> 6, of which `extra` makes something more; fx does not get by the `if`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.reader = Reader()
        self.modes = 0

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            return x
        self.modes += bool(watching())
        return self.extra(self.second(torch.tanh(self.first(x))))

    def extra(self, x: Tensor) -> Tensor:
        return x


def watching() -> int:
    return sum(isinstance(mode, WeightWatch) for mode in _get_current_function_mode_stack())


class Alias(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        return nn.functional.linear(x, layer.weight)


class Subscript(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._modules["first"].weight)


class Loop(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        for part in (self.first,):
            x = multiply(x, part.weight)
        return x


class HandedOver(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        return self.reader(x, self.first)


class Transposed(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        return x @ layer.weight.T


class Data(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        return nn.functional.linear(x, weight=layer.weight.data)


class Converted(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        return nn.functional.linear(x, layer.weight.to(x.dtype, copy=True))


class InAList(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        return torch.block_diag(*[layer.weight])[: len(x)] + x


class Sliced(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        return torch.cat([x[:, :3] @ layer.weight[:3, :3], x[:, 3:]], dim=1)


READERS = [
    (Alias, "the model (Alias, in linear)"),
    (Subscript, "the model (Subscript, in linear)"),
    (Loop, "the model (Loop, in mT)"),
    (HandedOver, "reader (Reader, in linear)"),
    (Transposed, "the model (Transposed, in T)"),
    (Data, "the model (Data, in data)"),
    (Converted, "the model (Converted, in to)"),
    (InAList, "the model (InAList, in block_diag)"),
    (Sliced, "the model (Sliced, in __getitem__)"),
]


def adapted(model: nn.Module, **options: Any) -> tuple[Any, Any]:
    """A base model, and a transformed copy with random vectors."""
    base = model.double()
    torch.manual_seed(0)
    twin = hra_fx.transform(copy.deepcopy(base), CONFIG, **options)
    randomise(twin)
    return base, twin


@pytest.mark.parametrize(("make", "reader"), READERS)
@pytest.mark.parametrize("mode", [True, False])
def test_a_read_that_no_source_shows_raises_at_the_first_forward(make: Any, reader: str, mode: bool) -> None:
    _, model = adapted(make())
    before = picture(model.train(mode))
    for _ in range(2):  # also when it is tried again
        with pytest.raises(UnsupportedLayerError) as caught:
            model(X)
        assert str(caught.value) == (
            f"first: {reader} reads its weight, and neither a source nor a graph told so: its reflections act on what "
            "it is called with, and are not seen there. Take the adapters off (hra_fx.HRAModel.unload, or load the "
            "model anew) and call hra_fx.transform(..., example_inputs=...), which sees it and reflects the weight."
        )
    assert watching() == 0
    model.modes = 0
    assert [part for part in picture(model)[1] if part not in before[1]] == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [make for make, _ in READERS if make is not Data])
def test_with_an_example_the_weight_is_reflected_there_too(make: Any) -> None:
    base, model = adapted(make(), example_inputs=X)
    assert [row.on_weight for row in hra_fx.report(model).rows] == [True, False]
    check(base, model, X)


def test_a_read_of_data_has_the_reflected_weight_and_no_gradient_there() -> None:
    base, model = adapted(Data(), example_inputs=X)
    assert_same(model(X), run_dense(base, model, X))


@pytest.mark.parametrize("take", [lambda layer: layer._parameters["weight"], lambda layer: next(layer.parameters())])
def test_a_read_past_the_attribute_is_refused_with_and_without_an_example(take: Callable[[Any], Tensor]) -> None:
    class Past(Untraceable):
        def extra(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, take(self.first))

    for options in ({}, {"example_inputs": X}):
        _, model = adapted(Past(), **options)
        with pytest.raises(UnsupportedLayerError) as caught:
            model(X)
        assert str(caught.value).startswith("first: the model (Past, in linear) reads its weight")
    assert str(caught.value).endswith(
        "past the attribute, as _parameters or parameters() give it, where no reflection can be seen. Take the "
        "adapters off (hra_fx.HRAModel.unload, or load the model anew) and leave the layer out with exclude_modules."
    )


class Asking(Untraceable):
    """Asks weights what they are, and makes others like them."""

    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        weight = layer.weight
        if weight.is_cuda or (weight.requires_grad and weight.device.type == "meta"):
            return x
        assert weight.shape[0] == weight.size(1) == 6 and weight.numel() == 36 and weight.dim() == weight.ndim == 2
        assert weight.is_floating_point() and weight.stride() == (6, 1) and weight.is_contiguous()
        same = x.to(weight).type_as(weight).to(weight.device) + weight.new_zeros(1) + torch.zeros_like(weight).sum()
        return same + torch.empty_like(layer.weight, dtype=torch.int8).numel() * 0.0


class Copied(Untraceable):
    """Another layer holds the same parameter, and reads its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 6)
        self.table.weight = self.first.weight

    def extra(self, x: Tensor) -> Tensor:
        return x + self.table(torch.tensor([0, 1, 2, 3]))


class Checkpointed(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, checkpoint(self.first, x, use_reentrant=False), use_reentrant=torch.is_grad_enabled())


class CallsItself(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        return self(x * 0 + 1) if float(x.detach().abs().min()) < 1e-9 else x


class CatchesErrors(Untraceable):
    """Goes on where a child failed, its own hook among the causes."""

    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_pre_hook(self.forbid)

    @staticmethod
    def forbid(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[-1] != 6:
            raise ValueError("not six")

    def extra(self, x: Tensor) -> Tensor:
        for wrong in (x[:, :5], x[:, :4]):
            try:
                x = self.first(wrong)
            except ValueError:
                x = self.second(x)
        return x


QUIET = [Untraceable, Asking, Copied, Checkpointed, CallsItself, CatchesErrors]


@pytest.mark.parametrize("make", QUIET)
def test_no_false_alarm(make: Any) -> None:
    base, model = adapted(make())
    for mode in (True, False):
        with torch.no_grad():
            assert_same(model.train(mode)(X), run_dense(base, model, X))
    assert record_of(model).looked == {True, False}
    model(X.clone().requires_grad_()).sum().backward()
    assert model.first.hra_u["default"].grad is not None


def test_it_runs_once_a_mode_and_changes_not_a_bit() -> None:
    _, model = adapted(Untraceable())
    for mode in (True, False, True, False):
        model.train(mode)
        torch.manual_seed(0)
        first = model(X)
        torch.manual_seed(0)
        assert torch.equal(first, model(X))
    assert model.modes == 2
    model.train()
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=2, target_modules=["second", "reader.*|first"][:1]))
    for _ in range(2):
        model(X)
        hra_fx.set_adapter(model, "other")
        model(X)
    assert model.modes == 3 or record_of(model).looked == {True, False}


def test_a_new_adapter_with_new_layers_is_watched_again() -> None:
    model = Untraceable().double()
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["second"]))
    model(X), model.eval()(X)
    model.extra = Alias.extra.__get__(model)
    model(X)
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=2, target_modules=["first"]))
    with pytest.raises(UnsupportedLayerError, match=r"first: the model \(Untraceable, in linear\) reads its weight"):
        model(X)


def test_a_forward_that_fails_leaves_nothing_behind_and_the_next_one_is_watched() -> None:
    _, model = adapted(Alias())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(X[:, :5])
        assert watching() == 0 and record_of(model).looked == set()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    with pytest.raises(UnsupportedLayerError):
        model(X)


def test_a_trace_is_no_forward_and_the_next_one_is_watched() -> None:
    _, model = adapted(Alias())
    with pytest.raises(TypeError, match="not 'Proxy'"):
        fx.symbolic_trace(model)
    with pytest.raises(UnsupportedLayerError):
        model(X)


def test_norms_that_a_user_computes_outside_of_the_forward() -> None:
    base, model = adapted(Untraceable())
    decay = sum(parameter.square().sum() for parameter in model.parameters())
    model(X).sum().backward()
    decay = decay + model.first.weight.norm() + (model.first.weight.T @ X.T).sum()
    assert torch.isfinite(decay)
    assert_same(model(X), run_dense(base, model, X))


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
