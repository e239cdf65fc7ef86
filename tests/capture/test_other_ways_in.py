"""A captured model is called in other ways than `model(x)`: every way in gives what the oracle gives."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from capture.checks import adapt, assert_close, assert_equals_oracle, assert_whole, inputs, oracle, spied, vectors
from capture.models import Convolutions, Host, Optional, Stack
from torch import Tensor, fx, nn

import hra_fx
from hra_fx.layers.adapters import Reflection

X = inputs(4, 6)
IMAGES = inputs(2, 3, 6, 6)


def stacks() -> tuple[nn.Module, nn.Module, nn.Module]:
    """A whole model in eval mode, its base, and its oracle."""
    adapted, base = adapt(Stack())
    assert_whole(adapted)
    spied(adapted, X)
    return adapted.eval(), base.eval(), oracle(adapted, base).eval()


WAYS: dict[str, Callable[[nn.Module], Tensor]] = {
    "call": lambda model: model(X),
    "keyword": lambda model: model(x=X),
    "forward": lambda model: model.forward(X),
    "other methods": lambda model: model.forward_head(model.forward_features(X)),
    "a method with an argument": lambda model: model.forward_head(model.forward_features(X), pre_logits=True),
    "parts in a row": lambda model: nn.Sequential(model.stem, model.scale, *model.blocks, model.head)(X),
    "all but the head": lambda model: nn.Sequential(model.stem, model.scale, *model.blocks)(X),
    "a site alone": lambda model: model.stem(X),
    "a site by keyword": lambda model: model.stem(input=X),
    "a block alone": lambda model: model.blocks[0](model.stem(X)),
    "forward of a site": lambda model: model.stem.forward(X),
    "as a child of another": lambda model: nn.Sequential(model, nn.Tanh())(X),
    "no_grad": torch.no_grad()(lambda model: model(X)),
    "inference_mode": torch.inference_mode()(lambda model: model(X)),
    "vmap": lambda model: torch.func.vmap(model)(X),
    "Jacobian": lambda model: torch.func.jacrev(lambda x: model(x))(X),
    "functional_call": lambda model: torch.func.functional_call(model, {"stem.bias": torch.ones(8).double()}, (X,)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_is_adapted(way: str) -> None:
    adapted, _, plain = stacks()
    assert_close(WAYS[way](adapted).detach(), WAYS[way](plain).detach())


def test_children_in_a_sequence_as_feature_extractors_are_made() -> None:
    adapted, base = adapt(Convolutions())
    plain = oracle(adapted, base).eval()
    adapted.eval()
    results = [nn.Sequential(*list(model.children())[:-1])(IMAGES) for model in (adapted, plain)]
    assert_close(results[0].detach(), results[1].detach())


def test_optional_argument_given() -> None:
    adapted, base = adapt(Optional())
    assert_equals_oracle(adapted, base, X, inputs(4, 8))
    assert_equals_oracle(adapted, base, X, mask=inputs(4, 8), gain=2.0)


def test_timm_features_and_head() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5
    )
    adapted, base = adapt(model, ["qkv", "proj", "fc1", "fc2"])
    assert_whole(adapted)
    adapted.eval()
    plain = oracle(adapted, base).eval()
    image = inputs(2, 3, 32, 32)
    assert_close(adapted(image).detach(), plain(image).detach())
    features = adapted.forward_features(image)
    assert_close(features.detach(), plain.forward_features(image).detach())
    assert_close(adapted.forward_head(features).detach(), plain.forward_head(features).detach())
    assert_close(*[[leaf.detach() for leaf in m.forward_intermediates(image)[1]] for m in (adapted, plain)])
    adapted.reset_classifier(3), plain.reset_classifier(3)
    plain.head.load_state_dict(adapted.head.double().state_dict())
    plain.double()
    assert_close(adapted(image).detach(), plain(image).detach())


# Where a graph breaks, Dynamo looks at `.grad` of what it goes on with, and torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("make", [Stack, Host], ids=["whole", "regions"])
def test_torch_compile(make: type[nn.Module]) -> None:
    torch.compiler.reset()
    adapted, base = adapt(make())
    plain = oracle(adapted, base)
    compiled = torch.compile(adapted, backend="eager", fullgraph=make is Stack)
    for mode in (False, True):
        adapted.train(mode), plain.train(mode)
        torch.manual_seed(0)
        found = compiled(X)
        torch.manual_seed(0)
        assert_close(found.detach(), plain(X).detach())
    found.sum().backward()
    assert all(chain.grad is not None for chain in vectors(adapted).values())
    assert_equals_oracle(adapted, base, X)
    torch.compiler.reset()


def test_torch_export() -> None:
    adapted, _, plain = stacks()
    batch = torch.export.Dim("batch")
    program = torch.export.export(adapted, (X,), dynamic_shapes=({0: batch},))
    for rows in (4, 7):
        x = inputs(rows, 6)
        assert_close(program.module()(x).detach(), plain(x).detach())
    assert_close(adapted(X).detach(), plain(X).detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace() -> None:
    adapted, _, plain = stacks()
    traced = torch.jit.trace(adapted, (X,))
    x = inputs(7, 6)
    assert_close(traced(x).detach(), plain(x).detach())


def test_symbolic_trace_of_the_adapted_model() -> None:
    adapted, _, plain = stacks()
    graph = fx.symbolic_trace(adapted)
    assert_close(graph(X).detach(), plain(X).detach())
    assert_close(adapted(X).detach(), plain(X).detach())


def test_a_region_inside_a_model_that_the_user_traces() -> None:
    adapted, _, plain = stacks()
    graph = fx.symbolic_trace(nn.Sequential(adapted, nn.Tanh()))
    assert_close(graph(X).detach(), torch.tanh(plain(X)).detach())


def test_functional_call_with_other_vectors() -> None:
    adapted, base, _ = stacks()
    other = {name: torch.randn_like(value) for name, value in adapted.named_parameters() if ".hra_u." in f".{name}"}
    found = torch.func.functional_call(adapted, other, (X,))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if name in other:
                value.copy_(other[name])
    assert_close(found.detach(), oracle(adapted, base)(X).detach())


def test_per_sample_gradients() -> None:
    adapted, _, _ = stacks()
    chains = {name: value.detach() for name, value in adapted.named_parameters() if ".hra_u." in f".{name}"}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(adapted, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(chains, X)
    adapted.zero_grad()
    adapted(X).square().sum().backward()
    for name, value in adapted.named_parameters():
        if name in chains:
            assert_close(each[name].sum(0), value.grad)


@pytest.mark.parametrize("make", [Stack, Host], ids=["whole", "regions"])
def test_threads(make: type[nn.Module]) -> None:
    """Calls of several threads, the very first ones too."""
    adapted, base = adapt(make())
    adapted.eval()
    plain = oracle(adapted, base).eval()
    values = [inputs(3, 6, value=value) for value in range(8)]
    found: dict[int, Tensor] = {}
    start = threading.Barrier(len(values))

    def run(index: int) -> None:
        start.wait()
        for _ in range(3):
            found[index] = adapted(values[index]).detach()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(values))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(values)
    for index, value in enumerate(values):
        assert_close(found[index], plain(value).detach())


def test_transform_in_one_thread_while_another_model_runs_in_a_second() -> None:
    """The trace patches torch for itself alone."""
    runner = Stack().double().train()
    stop, errors = threading.Event(), []

    def run() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    assert not runner(X).requires_grad
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    runner(X)
            except Exception as error:
                errors.append(error)
                return

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(3):
        adapt(Stack())
    stop.set()
    thread.join()
    assert not errors


def test_no_rows_at_all() -> None:
    adapted, _, plain = stacks()
    assert adapted(X[:0]).shape == plain(X[:0]).shape == (0, 5)


class Retracer(fx.Tracer):
    """For graphs with reflections: those are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Reflection) or super().is_leaf_module(m, module_qualified_name)


def test_the_graph_as_a_module_of_its_own() -> None:
    adapted, base, plain = stacks()
    graph = hra_fx.graphs(adapted)[""]
    assert_close(graph(X).detach(), plain(X).detach())
    again = fx.GraphModule(graph, Retracer().trace(graph))
    assert_close(again(X).detach(), plain(X).detach())
    copied = copy.deepcopy(graph)
    assert_close(copied(X).detach(), plain(X).detach())
    hra_fx.graphs(adapted.train())[""].graph.find_nodes(op="output")[0].args = (None,)
    assert_equals_oracle(adapted, base, X)
