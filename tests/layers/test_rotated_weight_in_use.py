"""Models whose weights are read as `W Q`: copied, saved, moved, and read in every way."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from layers.checking import assert_same, check, check_fold, normal, pair, run_dense, vectors_of
from layers.reading_weights import (
    TARGETS,
    USES,
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


# ---- checkpoints and replicas ----


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
    base, model = pair(lambda: Reading(use, branches), TARGETS, apply_GS=branches)
    check(base, model, X)
    if not branches:
        graph = hra_fx.graphs(model)[""]
        assert_same(graph(X), run_dense(base, model, X))
    assert type(check_fold(base, model, X)) is Reading
