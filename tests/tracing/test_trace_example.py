"""`transform(..., trace=True)`, with and without an example: a graph does what eager mode does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import randomise
from graph_modules import COPIES, X, config, targets_of
from layers.checking import assert_same
from torch import Tensor, fx, nn
from tracing.captured import CASES, bert, llama, made_pair, pair_of, tokens, twins
from tracing.models import Branches, Dropout, Optional, Two

import hra_fx
from hra_fx.errors import AdapterError


@pytest.mark.parametrize("name", ["llama", "bert", pytest.param("resnet", marks=pytest.mark.slow)])
def test_a_graph_does_what_eager_mode_does(name: str, tmp_path: Path) -> None:
    first = made_pair(name)
    assert isinstance(first.graph, fx.GraphModule)
    first.check()
    pair = pair_of(name)
    for kind, model in (("eager", pair.eager), ("graph", pair.graph)):
        hra_fx.save_adapter(model, tmp_path / kind)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "eager" / file).read_bytes() == (tmp_path / "graph" / file).read_bytes()
    pair.both(lambda model: hra_fx.load_adapter(model, tmp_path / "eager", "second"))
    pair.both(lambda model: hra_fx.set_adapter(model, "second"))
    pair.check()
    pair.both(hra_fx.merge_adapter)
    pair.check()
    pair.both(hra_fx.unmerge_adapter)
    pair.both(lambda model: hra_fx.set_adapter(model, "default"))
    pair.both(lambda model: hra_fx.delete_adapter(model, "second"))
    with hra_fx.disable_adapters(pair.eager), hra_fx.disable_adapters(pair.graph):
        pair.check()
    assert str(hra_fx.report(pair.graph)) == str(hra_fx.report(pair.eager))
    torch.testing.assert_close(hra_fx.orthogonality_loss(pair.graph), hra_fx.orthogonality_loss(pair.eager))
    pair.graph = pickle.loads(pickle.dumps(copy.deepcopy(pair.graph)))
    pair.check()
    pair.both(hra_fx.fold)
    assert list(pair.graph.state_dict()) == list(CASES[name].make().state_dict())
    pair.check()


def test_adapters_are_scaled_and_written_as_lora(tmp_path: Path) -> None:
    pair = pair_of("llama")
    pair.both(lambda model: hra_fx.add_adapter(model, "second", hra_fx.HRAConfig(r=2, target_modules=["v_proj"])))
    randomise(pair.eager)
    pair.graph.load_state_dict(pair.eager.state_dict())
    pair.both(lambda model: hra_fx.set_adapter(model, ["second", "default"]))
    pair.both(lambda model: hra_fx.set_scale(model, "second", 0.5))
    pair.check()
    for kind, model in (("eager", pair.eager), ("graph", pair.graph)):
        hra_fx.save_as_lora(model, tmp_path / kind)
    for file in (tmp_path / "eager").iterdir():
        assert file.read_bytes() == (tmp_path / "graph" / file.name).read_bytes()


def test_a_graph_is_compiled_and_exported() -> None:
    graph, eager = twins(Branches().double().eval(), X)
    compiled = torch.compile(graph, backend="eager", dynamic=True)
    for x in (X, torch.cat([X, X])):
        assert_same(compiled(x), eager(x))
    assert_same(torch.export.export(graph, (X,)).module()(X), eager(X))


class Normed(Branches):
    """Casts, as the norms of language models do."""

    def middle(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + 1e-6)


def test_a_graph_runs_under_autocast() -> None:
    x = X.float()
    graph, eager = twins(Normed(), x)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (model(x)["out"] for model in (graph, eager))
    assert found.dtype is wanted.dtype is torch.bfloat16
    torch.testing.assert_close(found, wanted)


def test_an_example_is_made_from_the_configuration() -> None:
    model = bert().eval()
    plain = copy.deepcopy(model)
    graph = hra_fx.transform(model, config("query"), trace=True)
    inputs = tokens(3, 9)
    torch.testing.assert_close(graph(**inputs).logits, plain(**inputs).logits)


def test_sizes_that_do_not_fit_are_named() -> None:
    shapes = {name: {0: torch.export.Dim("batch")} for name in ("input_ids", "attention_mask")}
    graph = hra_fx.transform(llama(), config("q_proj"), trace=True, example_inputs=tokens(2, 5), dynamic_shapes=shapes)
    assert graph(**tokens(3, 5)).logits.shape == (3, 5, 16)
    message = r"captured for inputs with `input_ids\.size\(\)\[1\] == 5`.*pass them as `example_inputs`"
    stored = pickle.dumps(graph)
    for other in (graph, copy.deepcopy(graph), pickle.loads(stored), copy.deepcopy(pickle.loads(stored))):
        with pytest.raises(AssertionError, match=message):
            other(**tokens(2, 6))


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=str)
def test_options_are_as_in_eager_mode(options: dict[str, Any]) -> None:
    graph, eager = twins(Branches().double(), X, assign=True, **options)
    assert_same(graph(X), eager(X))


@pytest.mark.parametrize("more", [{}, {"mask": torch.randn(8).double()}], ids=["default", "mask"])
def test_the_graph_is_called_as_in_the_example(more: dict[str, Any]) -> None:
    inputs = {"x": X} | more
    graph, eager = twins(Optional().double(), inputs)
    torch.testing.assert_close(graph(**inputs), eager(**inputs), rtol=1e-12, atol=1e-13)


class Router(nn.Linear):
    """Returns two tensors, as the routers of Llama 4 and PhiMoE do."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input).topk(2)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(6, 6), Router(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores, places = self.router(self.first(x) if x.shape[0] > 0 else x)
        gathered: Tensor = torch.gather(self.first(x), 1, places) * scores
        return gathered


def test_a_layer_that_returns_several_tensors_is_recorded_by_its_operators() -> None:
    graph, eager = twins(Routed().double(), X, config("first", "router"))
    assert "router" not in targets_of(graph)
    x = torch.randn(9, 6).double()
    assert_same(graph(x), eager(x))
    assert_same(hra_fx.fold(graph)(x), eager(x))


# ---- traced without an example ----


def traced(make: Callable[[], nn.Module], *targets: str, **fields: Any) -> tuple[nn.Module, Any]:
    """A base model, and its adapted GraphModule with random vectors."""
    torch.manual_seed(0)
    base = make().double()
    model = hra_fx.transform(copy.deepcopy(base), config(*targets, **fields), trace=True)
    randomise(model)
    return base, model


def test_each_reflection_is_a_node_and_modules_are_shared() -> None:
    base = Dropout().double()
    parameters, keys = dict(base.named_parameters()), list(base.state_dict())
    model = hra_fx.transform(base, config(), trace=True)
    assert isinstance(model, fx.GraphModule) and type(model).__name__ == "Dropout"
    assert targets_of(model)[:2] == ["first.hra_u", "first"] and targets_of(model)[-2:] == ["second.hra_u", "second"]
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert [key for key in model.state_dict() if "hra_u" not in key] == keys
    assert hra_fx.transform(model, config(), trace=True) is model


def test_adapters_are_added_switched_deleted_saved_and_loaded(tmp_path: Path) -> None:
    base, model = traced(Dropout, "first", bias="hra_only")
    hra_fx.add_adapter(model, "other", config("second"))
    randomise(model)
    assert targets_of(model)[-2:] == ["second.hra_u", "second"]
    for name in ("default", "other"):
        hra_fx.set_adapter(model, name)
        hra_fx.save_adapter(model, tmp_path / name, name)
        for loaded in (
            hra_fx.load_adapter(copy.deepcopy(base), tmp_path / name),
            hra_fx.load_adapter(fx.symbolic_trace(copy.deepcopy(base).eval()), tmp_path / name),
        ):
            assert_same(loaded.eval()(X), model.eval()(X))
    with hra_fx.disable_adapters(model):
        assert_same(model(X), base.eval()(X))
    hra_fx.set_adapter(model, "default")
    hra_fx.delete_adapter(model, "other")
    assert "second.hra_u" not in targets_of(model)
    for copied in COPIES:
        assert_same(copied(model)(X), model(X))


class Unused(Two):
    """Has tensors that no call uses, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
        self.token = nn.Parameter(torch.zeros(3))
        self.register_buffer("table", torch.ones(8, dtype=torch.float64), persistent=False)

    def middle(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden * self.table)


def test_unused_layers_keep_their_keys_and_adapters() -> None:
    base, model = traced(Unused, "first", "second", "head.0")
    eager = hra_fx.transform(copy.deepcopy(base), config("first", "second", "head.0"))
    assert model.state_dict().keys() == eager.state_dict().keys()
    eager.load_state_dict(model.state_dict())
    assert_same(model(X), eager(X))
    assert hra_fx.fold(model).state_dict().keys() == base.state_dict().keys()


class OneRow(nn.Module):
    """Allows a batch of 1 only, so the first captures fail. A layer has the name of a Python keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"in": nn.Linear(6, 5), "out": nn.Linear(6, 5)})

    def forward(self, x: Tensor, name: str = "out") -> Tensor:
        return self.layers[name](x.view(1, 6))


def test_a_layer_with_the_name_of_a_keyword_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"torch\.export fails \(SyntaxError"):
        hra_fx.transform(OneRow(), config("in"), trace=True, example_inputs=(torch.ones(1, 6), "in"))


class Assigned(nn.Module):
    """Assigns a buffer. Its call has two arguments, so the graph has its operators."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor, share: float) -> Tensor:
        self.mean = (1 - share) * self.mean + share * x.detach().mean(0)
        return x


class Assigning(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.average = Assigned()

    def middle(self, hidden: Tensor) -> Tensor:
        return self.average(hidden, 0.1)


def test_a_buffer_that_the_graph_would_not_update_is_refused() -> None:
    model = Assigning().double()
    with pytest.raises(AdapterError, match=r"after two calls, average\.mean is"):
        hra_fx.transform(model, config(), trace=True, example_inputs=X)
    assert not model.average.mean.any()


def test_hooks_of_the_model_run() -> None:
    model = Two().double()
    model.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    with pytest.raises(AdapterError, match=r"it has forward hooks, which torch\.fx does not run\. Pass example_inputs"):
        hra_fx.transform(model, config(), trace=True)
    graph, eager = twins(model, X)
    torch.testing.assert_close(graph(X), eager(X), rtol=1e-12, atol=1e-12)


class Numbered(Branches):
    """Its last arguments have the names that torch.export gives to items of `*x`."""

    def forward(self, x: list[Any], x_1: Tensor, x_2: Tensor) -> Any:  # type: ignore[override]
        hidden = self.first(x[0]) * (3 if x[1].shape[0] > 5 else 1)
        return self.second(hidden * 2 if x[2][0].shape[0] > 5 else hidden) + x_1.sum() + x_2.sum()


def test_an_argument_with_a_number_is_not_an_item_of_another_one() -> None:
    more, few = torch.cat([X, X]), X[:2]
    inputs = {"x": [X, more, [more]], "x_1": few, "x_2": few}
    graph, eager = twins(Numbered().double(), inputs)
    assert_same(graph(**inputs), eager(**inputs))
    for item, x in ((r"x\[1\]", [X, X, [more]]), (r"x\[2\]\[0\]", [X, more, [X]])):
        with pytest.raises(AssertionError, match=rf"captured for inputs with `.*{item}\.size"):
            graph(x=x, x_1=few, x_2=few)


class Arguments(Branches):
    def forward(self, x: Tensor, mask: Tensor | None = None, shift: Tensor | None = None, **others: Any) -> Any:
        return super().forward(x * mask + shift, scale=others["gain"])


def test_the_inputs_have_the_order_of_the_model() -> None:
    given = {"gain": 2.0, "shift": X.cos(), "mask": X.sin(), "x": X}
    graph, eager = twins(Arguments().double(), given)
    wanted = eager(**given)
    for found in (graph(**given), graph(X, X.sin(), X.cos(), gain=2.0)):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
