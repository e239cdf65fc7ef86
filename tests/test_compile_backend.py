"""`torch.compile(model, backend="hra_fx")`: the same numbers as the model with reflections in its weights, one graph,
products shared across layers, and no compilation that is not needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from adapting import randomise
from one_layer import normal
from oracles import dense_q, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hra_fx
from hra_fx.dynamo import backend
from hra_fx.errors import ConfigError
from hra_fx.operators import REFLECTED_BY, REFLECTED_ROWS, UNIT_FACTORS

TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
EAGER = {"backend": "aot_eager"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def llama(**fields: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64, **fields)).double()


def adapted(model: nn.Module, **fields: Any) -> Any:
    made = hra_fx.transform(model, hra_fx.HRAConfig(**{"r": 4, "target_modules": TARGETS, **fields}))
    randomise(made)
    return made


def with_dense_weights(base: nn.Module, model: nn.Module) -> Any:
    """The model without us: `W Q` by dense products, in its place."""
    made = copy.deepcopy(base)
    for path, layer in model.named_modules():
        if "hra_u" in layer._modules:
            box: Any = layer.hra_u
            spec = box.specs["default"]
            q = dense_q(box["default"].detach(), apply_GS=spec.apply_GS, anchor=box.anchor("default"))
            with torch.no_grad():
                made.get_submodule(path).weight.copy_(made.get_submodule(path).weight @ q)
    return made


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What of ours is in each graph after the passes."""
    found: list[dict[str, int]] = []
    rewrite = backend.rewrite

    def looked_at(module: Any, **options: Any) -> None:
        rewrite(module, **options)
        targets = [node.target for part in module.modules() if hasattr(part, "graph") for node in part.graph.nodes]
        names = (("rows", REFLECTED_ROWS), ("factors", UNIT_FACTORS), ("by", REFLECTED_BY))
        found.append({name: targets.count(target) for name, target in names if target in targets})

    monkeypatch.setattr(backend, "rewrite", looked_at)
    return found


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(sum(shape)))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    model.zero_grad()
    return found


def test_it_is_registered() -> None:
    assert "hra_fx" in torch._dynamo.list_backends(exclude_tags=())


@pytest.mark.parametrize(
    ("fields", "options", "left"),
    [
        ({}, {}, {"factors": 1, "by": 4}),
        ({}, {"hoist": False}, {"factors": 4, "by": 4}),
        ({}, {"share": False}, {"factors": 1, "by": 10}),
        ({}, {"share": False, "hoist": False}, {"rows": 10}),
        ({"r": 3}, {}, {"factors": 4, "by": 4}),  # with their anchors, made in the graph
        ({"apply_GS": True}, {}, {"factors": 4, "by": 4}),
    ],
)
def test_a_training_step_is_one_graph_that_shares(
    seen: list[dict[str, int]], fields: dict[str, Any], options: dict[str, Any], left: dict[str, int]
) -> None:
    base = llama()
    model = adapted(copy.deepcopy(base), **fields)
    inputs = {"input_ids": ids(2, 7), "labels": ids(2, 7), "use_cache": False}
    model(**inputs).loss.backward()
    eager = gradients(model)
    compiled = torch.compile(model, backend="hra_fx", fullgraph=True, options={**EAGER, **options})
    output = compiled(**inputs)
    output.loss.backward()
    assert seen == [left]
    assert relative_error(output.logits, with_dense_weights(base, model)(**inputs).logits) < 1e-11
    found = gradients(model)
    assert found.keys() == eager.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, eager[name]) < 1e-9, name


@pytest.mark.filterwarnings("ignore")  # inductor's own, of torch's deprecations
def test_with_inductor() -> None:
    base = llama()
    model = adapted(copy.deepcopy(base))
    compiled = torch.compile(model, backend="hra_fx", options={"max_autotune": False})
    output = compiled(input_ids=ids(2, 7), labels=ids(2, 7), use_cache=False)
    output.loss.backward()
    found = gradients(model)
    wanted = with_dense_weights(base, model)(input_ids=ids(2, 7)).logits
    # The angles of positions are float32 in any Llama, and inductor's sines are not those of eager PyTorch.
    assert relative_error(output.logits, wanted) < 1e-6
    model(input_ids=ids(2, 7), labels=ids(2, 7), use_cache=False).loss.backward()
    for name, gradient in gradients(model).items():
        assert relative_error(found[name], gradient) < 1e-5, name


def test_generate_with_a_cache(seen: list[dict[str, int]]) -> None:
    model = adapted(llama())
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids(1, 5), **asked)
    model.forward = torch.compile(model.forward, backend="hra_fx", options={"backend": "eager"})
    assert torch.equal(model.generate(ids(1, 5), **asked), wanted)
    assert all(found.get("rows", 0) == 0 for found in seen)
    assert len(seen) <= 4, "not a graph for each token"


def test_lengths_that_change_are_one_graph_more(seen: list[dict[str, int]]) -> None:
    base = llama()
    model = adapted(copy.deepcopy(base))
    dense = with_dense_weights(base, model)
    compiled = torch.compile(model, backend="hra_fx", options=EAGER)
    for length in (7, 9, 12, 5):
        got = compiled(input_ids=ids(2, length), use_cache=False).logits
        assert relative_error(got, dense(input_ids=ids(2, length)).logits) < 1e-11
    assert len(seen) == 2


def test_gradient_checkpointing(seen: list[dict[str, int]]) -> None:
    base = llama()
    model = adapted(copy.deepcopy(base))
    inputs = {"input_ids": ids(2, 7), "labels": ids(2, 7), "use_cache": False}
    model.train()
    model(**inputs).loss.backward()
    eager = gradients(model)
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    compiled = torch.compile(model, backend="hra_fx", options=EAGER)
    compiled(**inputs).loss.backward()
    assert all(found.get("rows", 0) == 0 for found in seen)
    for name, gradient in gradients(model).items():
        assert relative_error(gradient, eager[name]) < 1e-9, name


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x)


def test_a_switch_back_is_not_compiled_again(seen: list[dict[str, int]]) -> None:
    config = hra_fx.HRAConfig(r=2, target_modules=["q", "k"], init_weights=False)
    base = Switched()
    model = hra_fx.transform(copy.deepcopy(base), config, "a")
    hra_fx.add_adapter(model, "b", config)
    x = normal(1, 3, 6)
    compiled = torch.compile(model, backend="hra_fx", options=EAGER)

    def wanted(name: str) -> Tensor:
        q, k = (dense_q(getattr(model, layer).hra_u[name].detach()) for layer in ("q", "k"))
        return base.q(x @ q.mT) * base.k(x @ k.mT)

    for name in ("a", "b", "a", "b"):
        hra_fx.set_adapter(model, name)
        assert relative_error(compiled(x), wanted(name)) < 1e-12
    assert len(seen) == 2
    with hra_fx.disable_adapters(model):
        assert torch.allclose(compiled(x), base(x))


class Broken(Switched):
    def forward(self, x: Tensor) -> Tensor:
        first = self.q(x)
        torch._dynamo.graph_break()
        return first * self.k(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # TorchDynamo's own look at it
def test_a_graph_break_costs_no_correctness(seen: list[dict[str, int]]) -> None:
    base = Broken()
    model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=2, target_modules=["q", "k"], init_weights=False))
    x = normal(1, 3, 6)
    q, k = (dense_q(getattr(model, layer).hra_u["default"].detach()) for layer in ("q", "k"))
    compiled = torch.compile(model, backend="hra_fx", options=EAGER)
    assert relative_error(compiled(x), base.q(x @ q.mT) * base.k(x @ k.mT)) < 1e-12
    assert seen == [{"rows": 1}, {"rows": 1}]


class Writing(Switched):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        first = self.q(x)
        x.mul_(2)
        return first * self.k(x)


def test_a_value_that_is_written_into_is_read_anew() -> None:
    base = Writing()
    model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=2, target_modules=["q", "k"], init_weights=False))
    x = normal(1, 3, 6)
    q, k = (dense_q(getattr(model, layer).hra_u["default"].detach()) for layer in ("q", "k"))
    with torch.no_grad():
        got = torch.compile(model, backend="hra_fx", options=EAGER)(x)
    assert relative_error(got, base.q(x @ q.mT) * base.k(2 * x @ k.mT)) < 1e-12


@pytest.mark.parametrize(
    ("given", "named"),
    [({"options": {"backend": "eager", "max_autotune": True}}, "max_autotune"), ({"mode": "reduce-overhead"}, "mode")],
)
def test_what_is_inductors_is_refused_for_others(given: dict[str, Any], named: str) -> None:
    from torch.fx import symbolic_trace

    options = {"backend": "eager", **given.get("options", {})}
    with pytest.raises(ConfigError, match=f"{named} can be given for inductor only.*'eager'"):
        backend.hra_fx(symbolic_trace(Switched()), [], mode=given.get("mode"), options=options)
