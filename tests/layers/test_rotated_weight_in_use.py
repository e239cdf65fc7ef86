"""Models whose weights are read as `W Q`: copied, saved, moved, tied, compiled, exported, transformed and trained."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapting import config
from layers.checking import assert_same, dense_weights, normal, run_dense, vectors_of
from layers.reading_weights import X, assert_gradients, dense, functional, layer_pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hra_fx
from hra_fx.layers.rotated_weight import RotatedWeight

F64 = torch.float64
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


# ---- compilers, tracers, transformations ----


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


def test_functional_call_and_vmap() -> None:
    base, model = functional()
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wanted = run_dense(base, model, X)

    def run(vectors: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, state | {"read.hra_u.default": vectors}, (x,))

    vectors = model.read.hra_u["default"]
    assert_same(run(vectors.detach(), X), wanted)
    gradient = torch.func.grad(lambda u: (run(u, X) * normal(3, 3, 6)).sum())(vectors.detach())
    (oracle,) = torch.autograd.grad((wanted * normal(3, 3, 6)).sum(), vectors)
    assert_same(gradient, oracle)
    # A batch of adapters over one input, and one adapter over a batch of inputs.
    batch = torch.stack([vectors.detach(), normal(6, *vectors.shape)])
    for u, output in zip(batch, torch.vmap(run, (0, None))(batch, X), strict=True):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.read.hra_u["default"].copy_(u)
        assert_same(output, run_dense(base, other, X))
    assert_same(torch.vmap(run, (None, 0))(vectors.detach(), X), wanted)


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


# ---- optimizers ----


@pytest.mark.parametrize("foreach", [False, True])
def test_optimizers_hold_parameters_and_train_the_base_weight_too(foreach: bool) -> None:
    base, model = functional(r=2)
    model.requires_grad_()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=foreach)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(type(parameter) is nn.Parameter for parameter in held)
    assert {id(parameter) for parameter in held} == {id(layer.hra_base) for layer in model.children()} | {
        id(p) for name, p in model.named_parameters() if not name.endswith("weight")
    }
    losses = []
    for _ in range(5):
        loss = (model(X) - 0.3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained, state = copy.deepcopy(base), model.state_dict()
    trained.load_state_dict({name: state[name] for name in base.state_dict()})
    assert not torch.equal(trained.read.weight, base.read.weight)
    assert_same(model(X), run_dense(trained, model, X))
