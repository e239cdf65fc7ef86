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
from hra_fx.errors import ConfigError
from hra_fx.kernels.compile_ops import REFLECTED_BY, REFLECTED_ROWS, UNIT_FACTORS
from hra_fx.tracing import compile_backend as backend

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
        pytest.param({}, {"hoist": False}, {"factors": 4, "by": 4}, marks=pytest.mark.slow),
        pytest.param({}, {"share": False}, {"factors": 1, "by": 10}, marks=pytest.mark.slow),
        pytest.param({}, {"share": False, "hoist": False}, {"rows": 10}, marks=pytest.mark.slow),
        ({"r": 3}, {}, {"factors": 4, "by": 4}),  # with their anchors, made in the graph
        pytest.param({"apply_GS": True}, {}, {"factors": 4, "by": 4}, marks=pytest.mark.slow),
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_generate_with_a_cache(seen: list[dict[str, int]]) -> None:
    model = adapted(llama())
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids(1, 5), **asked)
    model.forward = torch.compile(model.forward, backend="hra_fx", options={"backend": "eager"})
    assert torch.equal(model.generate(ids(1, 5), **asked), wanted)
    assert all(found.get("rows", 0) == 0 for found in seen)
    assert len(seen) <= 4, "not a graph for each token"


@pytest.mark.slow
def test_lengths_that_change_are_one_graph_more(seen: list[dict[str, int]]) -> None:
    base = llama()
    model = adapted(copy.deepcopy(base))
    dense = with_dense_weights(base, model)
    compiled = torch.compile(model, backend="hra_fx", options=EAGER)
    for length in (7, 9, 12, 5):
        got = compiled(input_ids=ids(2, length), use_cache=False).logits
        assert relative_error(got, dense(input_ids=ids(2, length)).logits) < 1e-11
    assert len(seen) == 2


@pytest.mark.slow
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


# What the passes leave alone


class Activated(Switched):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        first = self.q(x)
        middle = self.act(x)
        return first + self.k(x) + middle


class Body(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        def body(z: Tensor) -> Tensor:
            z.mul_(2)
            return z.sum()

        total: Tensor = checkpoint(body, x, use_reentrant=False)
        return total


class ReluByPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x, True)


@pytest.mark.filterwarnings("ignore:.*remat_using_tags_for_fwd_loss_bwd_graph:UserWarning")  # torch 2.10, of a body
@pytest.mark.parametrize(
    "act",
    [nn.LeakyReLU(0.1, inplace=True), nn.ELU(inplace=True), nn.ReLU(inplace=True), ReluByPlace(), Body()],
    ids=lambda act: type(act).__name__,
)
def test_activations_in_place_between_sites(act: nn.Module) -> None:
    base = Activated(act)
    model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=2, target_modules=["q", "k"], init_weights=False))
    x = normal(1, 3, 6)
    q, k = (dense_q(getattr(model, layer).hra_u["default"].detach()) for layer in ("q", "k"))
    with torch.no_grad():
        got = torch.compile(model, backend="hra_fx", options=EAGER)(x)
        again = x.clone()
        middle = act(again)
        assert relative_error(got, base.q(x @ q.mT) + base.k(again @ k.mT) + middle) < 1e-12


class WithGradients(Switched):
    def __init__(self, wanted: bool) -> None:
        super().__init__()
        self.wanted = wanted

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.wanted):
            return self.k(torch.relu(self.q(x)))


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_gradients_are_on_where_they_were(inside: bool, outside: bool) -> None:
    model = hra_fx.transform(WithGradients(inside), hra_fx.HRAConfig(r=2, target_modules=["q", "k"]))
    randomise(model)
    x = normal(1, 3, 6).requires_grad_()

    def found(run: Any) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(outside):
            output = run(x)
        if output.requires_grad:
            output.sum().backward()
        return gradients(model)

    wanted = found(model)
    got = found(torch.compile(model, backend="hra_fx", options=EAGER))
    assert got.keys() == wanted.keys()
    assert len(wanted) == (2 if inside else 0)
    for name, gradient in got.items():
        assert relative_error(gradient, wanted[name]) < 1e-12


class Clamping(Switched):
    def forward(self, x: Tensor) -> Tensor:
        first = self.q(x)
        vectors: Any = self.k.hra_u
        vectors["default"].detach().clamp_(-0.1, 0.5)
        return first * self.k(x)


def test_vectors_that_are_written_into_by_another_name() -> None:
    base = Clamping()
    model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=2, target_modules=["q", "k"], init_weights=False))
    x = normal(1, 3, 6)
    q, k = (getattr(model, layer).hra_u["default"].detach().clone() for layer in ("q", "k"))
    with torch.no_grad():
        got = torch.compile(model, backend="hra_fx", options=EAGER)(x)
    wanted = base.q(x @ dense_q(q).mT) * base.k(x @ dense_q(k.clamp(-0.1, 0.5)).mT)
    assert relative_error(got, wanted) < 1e-12


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6).double() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        branch = torch.cond(x.sum() > 0, lambda x: self.b(x) * self.c(x), lambda x: self.c(x) - self.b(x), (x,))
        result: Tensor = self.a(x) + branch
        return result


def test_branches_stay_as_they_are() -> None:
    base = Branching()
    config = hra_fx.HRAConfig(r=2, target_modules=["a", "b", "c"], init_weights=False)
    model = hra_fx.transform(copy.deepcopy(base), config)
    x = normal(1, 3, 6)
    x = x if x.sum() > 0 else -x
    asked = [getattr(model, layer).hra_u["default"] for layer in "abc"]
    output = torch.compile(model, backend="hra_fx", options=EAGER)(x)
    a, b, c = (getattr(base, layer)(x @ dense_q(vectors).mT) for layer, vectors in zip("abc", asked, strict=True))
    assert relative_error(output, a + b * c) < 1e-12
    found, sought = (torch.autograd.grad(one.square().sum(), asked) for one in (output, a + b * c))
    for one, other in zip(found, sought, strict=True):
        assert relative_error(one, other) < 1e-9


@pytest.mark.parametrize(
    ("given", "named"),
    [({"options": {"backend": "eager", "max_autotune": True}}, "max_autotune"), ({"mode": "reduce-overhead"}, "mode")],
)
def test_what_is_inductors_is_refused_for_others(given: dict[str, Any], named: str) -> None:
    from torch.fx import symbolic_trace

    options = {"backend": "eager", **given.get("options", {})}
    with pytest.raises(ConfigError, match=f"{named} can be given for inductor only.*'eager'"):
        backend.hra_fx(symbolic_trace(Switched()), [], mode=given.get("mode"), options=options)
