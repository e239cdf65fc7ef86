"""Models whose weights are read as `W Q`: copied, saved, moved, tied, compiled, transformed, and read in every way."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import moe_models
import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import set_module_tensor_to_device
from adapting import config
from hypothesis import given, settings, strategies as st
from layers.checking import assert_same, check, check_fold, dense_weights, normal, pair, run_dense, vectors_of
from layers.reading_weights import (
    TARGETS,
    USES,
    ReadByAnother,
    Reading,
    X,
    assert_gradients,
    dense,
    functional,
    layer_pair,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hra_fx
from hra_fx.layers.rotated_weight import RotatedWeight

modes = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])


# ---- copies, files, dtypes ----


@modes
def test_copies_of_a_weight(grad: bool) -> None:
    base, layer = layer_pair()
    wanted = dense(base, layer).detach().clone()
    with torch.set_grad_enabled(grad):
        twin = copy.deepcopy(layer.weight)
        file = io.BytesIO()
        torch.save(layer.weight.detach(), file)
        file.seek(0)
        loaded, unpickled = torch.load(file, weights_only=True), pickle.loads(pickle.dumps(layer.weight.detach()))
        with torch.no_grad():
            layer.hra_base.zero_()
        assert type(loaded) is type(unpickled) is Tensor
        for same in (twin.clone(), loaded, unpickled):
            assert_same(same, wanted)


# ---- tied weights ----


class Tied(nn.Module):
    """An output layer whose weight is the embedding's; `read` computes it functionally."""

    def __init__(self, *, read: bool) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.read = read

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.body(self.embed(ids)))
        return F.linear(x, self.head.weight) if self.read else self.head(x)


@pytest.mark.parametrize("read", [False, True])
def test_an_adapted_head_that_is_tied_to_the_embedding(read: bool) -> None:
    """The head is rotated, the embedding is not, and there is one parameter."""
    torch.manual_seed(0)
    base = Tied(read=read).double()
    model = hra_fx.transform(copy.deepcopy(base), config("head", "body", r=3))
    with torch.no_grad():
        for vectors in vectors_of(model).values():
            vectors.copy_(normal(4, *vectors.shape))
    assert model.head.hra_base is model.embed.weight is model.head._parameters["weight"]
    assert type(model.head.weight) is RotatedWeight
    ids, weights = torch.arange(9), dense_weights(base, model)
    hidden = torch.tanh(F.linear(base.embed(ids), weights["body.weight"], base.body.bias))
    assert_gradients(model(ids), hidden @ weights["head.weight"].mT, list(vectors_of(model).values()))
    assert len([*model.parameters()]) == len([*base.parameters()]) + 2


# ---- compilers, checkpoints and replicas ----


def test_a_compiled_function_that_gets_a_weight() -> None:
    base, layer = layer_pair()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: F.linear(x, w) * w.shape[0], backend="eager", fullgraph=True)
    assert_gradients(compiled(X, layer.weight), 4 * X @ dense(base, layer).mT, [layer.hra_u["default"]])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    base, model = functional()
    x = X.clone().requires_grad_()
    (checkpoint(model, x, use_reentrant=reentrant) * normal(3, 3, 6)).sum().backward()
    leaves = list(vectors_of(model).values())
    wanted = torch.autograd.grad((run_dense(base, model, X) * normal(3, 3, 6)).sum(), leaves)
    for leaf, oracle in zip(leaves, wanted, strict=True):
        assert_same(leaf.grad, oracle)


def test_a_replica_of_data_parallel_has_its_tensors_as_plain_attributes() -> None:
    base, model = functional()
    moved: Any = copy.deepcopy(base)
    with torch.no_grad():
        moved.read.weight.mul_(1.5)
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        twin = child._replicate_for_data_parallel()
        for key, parameter in child._parameters.items():
            twin._parameters.pop(key, None)
            setattr(twin, key, parameter * 1.5 if (name, key) == ("read", "weight") else parameter.view_as(parameter))
        replica._modules[name] = twin
    assert_gradients(replica(X), run_dense(moved, model, X), list(vectors_of(model).values()))


# ---- weights that a tool moves and stores again ----

F64 = torch.float64

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda w: w.to("cpu", F64),
    "copy": lambda w: w.to("cpu", copy=True),
    "cpu": lambda w: w.cpu(),
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.contiguous(),
    "double": lambda w: w.double(),
    "type": lambda w: w.type(F64),
}


def stored(moved: Tensor, *, trained: bool = False) -> nn.Parameter:
    return nn.Parameter(moved, requires_grad=trained)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(sorted(MOVES)), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_a_moved_weight_that_is_stored_in_its_layer_is_the_base_weight(
    moves: list[str], grad: bool, trained: bool
) -> None:
    base, model = functional()
    for path in ("called", "read", "both"):
        layer = model.get_submodule(path)
        with torch.set_grad_enabled(grad):
            weight = layer.weight
            for move in moves:
                weight = MOVES[move](weight)
            if {*moves} <= {"data", "detach"}:  # the weight itself, which cannot be a leaf of autograd
                with pytest.raises(hra_fx.AdapterError, match=r"layer\.weight\.detach\(\)\.clone\(\)"):
                    stored(weight)
                continue
            layer._parameters["weight"] = stored(weight, trained=trained)
        parameter = dict(model.named_parameters())[f"{path}.weight"]
        assert type(parameter) is nn.Parameter and parameter.requires_grad is trained
        assert torch.equal(parameter, base.get_submodule(path).weight)
    wanted = run_dense(base, model, X).detach()
    assert_same(model(X), wanted)
    assert_same(hra_fx.fold(model)(X), wanted)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_moved_weight_of_experts_is_the_base_weight_too(name: str, grad: bool) -> None:
    model = hra_fx.transform(moe_models.built(name, implementation="eager"), moe_models.experts_config())
    moe_models.randomise(model)
    call = moe_models.call_of(name)
    wanted, before = model(**call).logits, copy.deepcopy(model.state_dict())
    with torch.set_grad_enabled(grad):
        for module in list(model.modules()):
            if hasattr(module, "hra_down_proj"):
                module._parameters["down_proj"] = stored(module.down_proj.cpu().clone())
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert_same(model(**call).logits, wanted)


def test_accelerate_moves_the_base_weight_to_the_meta_device_and_back() -> None:
    base, model = functional()
    wanted = run_dense(base, model, X)
    set_module_tensor_to_device(model, "read.weight", "meta")
    assert model.read.weight.is_meta and model.read.hra_base.is_meta
    set_module_tensor_to_device(model, "read.weight", "cpu", value=base.read.weight)
    assert_same(model(X), wanted)


def test_a_tied_weight_that_is_moved_by_its_adapted_layer_stays_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.embed = nn.Linear(6, 6, bias=False), nn.Embedding(6, 6)
            self.embed.weight = self.head.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    base = Tied()
    model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=2, target_modules=["head"], init_weights=False))
    wanted = model(torch.arange(6))
    again = stored(model.head.weight.to("cpu", copy=True))
    model.embed._parameters["weight"] = model.head._parameters["weight"] = again
    with hra_fx.disable_adapters(model):  # nothing reads the head before the embedding
        assert_same(model(torch.arange(6)), base(torch.arange(6)))
    moved = stored(model.head.weight.to("cpu", copy=True))
    model.embed._parameters["weight"] = model.head._parameters["weight"] = moved
    for module in (model.head, model.embed):  # as accelerate ties weights
        module.weight = model.head.weight
    assert model.embed.weight is model.head.hra_base
    assert_same(model(torch.arange(6)), wanted)


# ---- anywhere else ----


@pytest.mark.parametrize("grad", [True, False])
def test_a_copy_in_another_module_is_the_rotated_weight_and_trains(grad: bool) -> None:
    base, layer = layer_pair()
    wanted = dense(base, layer).detach()
    other = nn.Linear(6, 4).double()
    with torch.set_grad_enabled(grad):
        other.weight = nn.Parameter(layer.weight.clone())
    for same in (other.weight, copy.deepcopy(other).weight, pickle.loads(pickle.dumps(other)).weight):
        assert isinstance(same, nn.Parameter) and same.requires_grad
        assert_same(same, wanted)
    (other(X) * 2).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.5).step()
    assert_same(other.weight, wanted - X.flatten(0, -2).sum(0).expand(4, 6))
    assert torch.equal(layer.hra_base, base.weight)


# ---- every reader of a weight gets `W Q` ----


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("branches", [False, True], ids=["traceable", "untraceable"])
def test_every_reader_gets_the_rotated_weight(use: str, branches: bool) -> None:
    base, model = pair(lambda: Reading(use, branches), TARGETS)
    check(base, model, X)
    assert type(check_fold(base, model, X)) is Reading


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("fields", [{"r": 2}, {"r": 3, "apply_GS": True}], ids=["even", "GS"])
def test_the_graph_of_a_reader_computes_what_the_model_does(use: str, fields: dict[str, Any]) -> None:
    base, model = pair(lambda: Reading(use), TARGETS, **fields)
    graph = hra_fx.graphs(model)[""]
    mine = {name: id(parameter) for name, parameter in model.named_parameters()}
    theirs = {name: id(parameter) for name, parameter in graph.named_parameters()}
    assert theirs.items() <= mine.items()
    assert {name for name in mine if ".hra_u." in name} <= theirs.keys()
    assert_same(graph(X), model(X), rtol=1e-14)
    assert_same(graph(X), run_dense(base, model, X))
    reads = [node for node in graph.graph.nodes if str(node.target).endswith(".hra_base")]
    assert len(reads) >= 1
    for node in reads:
        (reflection,) = node.users
        assert reflection.target == str(node.target).replace(".hra_base", ".hra_u")
        assert reflection.kwargs == {"weight": node} and not reflection.args


class Left(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.own = layer, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.layer(x))


class Right(Left):
    def forward(self, x: Tensor) -> Tensor:
        return self.own(F.linear(x, self.layer.weight))


class TwoParents(nn.Module):
    """One layer, called by one module and read by another; their parent cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(6, 6)
        self.left, self.right = Left(shared), Right(shared)

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x)
        return self.right(x if float(x.detach().sum()) < 1e9 else -x)


def test_called_by_one_parent_and_read_by_another() -> None:
    base, model = pair(TwoParents, ["layer", "own"])
    check(base, model, X)
    graphs = hra_fx.graphs(model)
    assert graphs.keys() == {"left", "right"}
    for name, graph in graphs.items():
        assert_same(graph(X), getattr(model, name)(X), rtol=1e-14)
    check_fold(base, model, X)


def test_a_reader_that_comes_after_the_adapters() -> None:
    base, model = pair(lambda: Reading("called and read"), TARGETS)
    hra_fx.add_adapter(model, "other", config("fc"))
    hra_fx.set_adapter(model, ["default", "other"])
    with torch.no_grad():
        model.fc.hra_u["other"].normal_()
    assert_same(model(X), run_dense(base, model, X, adapters=("default", "other")))
    wanted = dense_weights(base, model, ("default", "other"))["fc.weight"]
    assert_same(ReadByAnother(model.fc)(X), F.linear(X, wanted))
