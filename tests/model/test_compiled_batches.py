"""`torch.compile(model)`: the numbers of the model with `W Q` in its weights, one graph, one batch of factors, no
unnecessary compilation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny_models
import torch
from adapting import adapted
from model import many
from one_layer import normal
from oracles import relative_error
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend

import hra_fx

TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def llama(layers: int = 2) -> Any:
    return tiny_models.llama(num_hidden_layers=layers).double()


class Recorder:
    """A backend of `torch.compile` that records, for each graph, the number of layers in each batch of factors."""

    def __init__(self, then: str = "aot_eager") -> None:
        self.batches: list[list[int]] = []
        self.then = lookup_backend(then)

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Any:
        nodes = [node for part in graph.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes]
        found = [node for node in nodes if node.target is torch.ops.hra_fx.batched_factors.default]
        self.batches.append(
            [len(list(node.args[0])) // sum(1 + (form >= 4) for form in node.args[1]) for node in found]
        )
        return self.then(graph, inputs)


@pytest.fixture
def seen() -> Recorder:
    return Recorder()


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(sum(shape)))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own, of torch's deprecations
def test_with_inductor() -> None:
    base = llama()
    model = adapted(copy.deepcopy(base), *TARGETS, r=4)
    compiled = torch.compile(model)
    output = compiled(input_ids=ids(2, 7), labels=ids(2, 7), use_cache=False)
    output.loss.backward()
    found = gradients(model)
    wanted = tiny_models.rotated(base, model)(input_ids=ids(2, 7)).logits
    # The angles of positions are float32 in any Llama, and inductor's sines are not those of eager PyTorch.
    assert relative_error(output.logits, wanted) < 1e-6
    model(input_ids=ids(2, 7), labels=ids(2, 7), use_cache=False).loss.backward()
    for name, gradient in gradients(model).items():
        assert relative_error(found[name], gradient) < 1e-5, name


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x)


def test_a_model_that_is_compiled_before_any_model_ran(seen: Recorder) -> None:
    """In a new thread, because what runs is known for each thread, and other tests ran models in this one."""
    model, x = adapted(Switched(), "q", "k", r=2), normal(1, 3, 6)

    def train_and_evaluate() -> Tensor:
        compiled = torch.compile(model, backend=seen)
        compiled(x).sum().backward()
        model.eval()
        with torch.no_grad():
            return compiled(x)

    with ThreadPoolExecutor(1) as pool:
        assert relative_error(pool.submit(train_and_evaluate).result(), model(x)) < 1e-12
    assert seen.batches == [[2], [2]]


class Broken(Switched):
    """Has a graph break."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.q(x)
        torch._dynamo.graph_break()
        return first * self.k(x)


class Skipping(Switched):
    """Does not call one of its layers, which gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.k(x)
        return result


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # TorchDynamo reads it
@pytest.mark.parametrize("make", [Switched, Broken, Skipping])
def test_outputs_and_gradients_are_those_of_the_eager_model(make: type[nn.Module]) -> None:
    seen = Recorder("eager")
    model, x = adapted(make(), "q", "k", apply_GS=make is Switched), normal(1, 3, 6)

    def found(run: Any) -> tuple[Tensor, dict[str, Tensor]]:
        output = run(x)
        output.square().sum().backward()
        return output.detach(), gradients(model)

    (wanted, exact), (output, got) = found(model), found(torch.compile(model, backend=seen))
    assert relative_error(output, wanted) < 1e-11
    assert got.keys() == exact.keys() and len(exact) == (1 if make is Skipping else 2)
    for name, gradient in got.items():
        assert relative_error(gradient, exact[name]) < 1e-9, name
    # After a graph break, each layer computes its own factors.
    assert [layers for batch in seen.batches for layers in batch] == ([1, 1] if make is Broken else [2])


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()).double() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # TorchDynamo reads it
def test_blocks_that_are_compiled_one_by_one_share_a_graph() -> None:
    seen = Recorder("eager")
    model = adapted(Blocks(), r=4, target_modules=r"blocks\.\d\.0")
    x = normal(1, 3, 6)
    wanted = model(x)
    for block in model.blocks:
        block.compile(backend=seen)
    for _ in range(3):
        assert relative_error(model(x), wanted) < 1e-12
    assert all(found == [1] for found in seen.batches)
    assert len(seen.batches) <= len(model.blocks)


def test_each_set_of_adapters_is_compiled_once() -> None:
    """The functions get the compiled model."""
    seen = Recorder("eager")
    plain, model = many.adapted(many.net(), a=many.config("first", "second"), b=many.config("first", r=4))
    fast, x = torch.compile(model, backend=seen, fullgraph=True), many.normal(4, 6)
    sets = (["a"], [], ["a", "b"])
    for order in sets:
        hra_fx.set_adapter(fast, order)
        fast(x)
    graphs = len(seen.batches)
    assert graphs
    for order in (*reversed(sets), *sets):
        hra_fx.set_adapter(fast, order)
        many.assert_close(fast(x), many.oracle(plain, model, order, x))
    assert len(seen.batches) == graphs
    wanted = many.oracle(plain, model, ["a", "b"], x)
    for _ in range(2):
        with hra_fx.disable_adapters(fast):
            assert torch.equal(fast(x), plain(x))
        hra_fx.merge_adapter(fast)
        many.assert_close(fast(x), wanted)
        hra_fx.unmerge_adapter(fast)
        hra_fx.set_scale(fast, "b", 0)
        many.assert_close(fast(x), many.oracle(plain, model, ["a"], x))
        hra_fx.set_scale(fast, "b", 1)
        many.assert_close(fast(x), wanted)
