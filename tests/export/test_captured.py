"""Captured graph modules, transformed and folded in place."""

from __future__ import annotations

import pytest
import torch
from export.programs import QUIET, capture, config, mixed, normal
from oracles import relative_error
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import hra_fx
from hra_fx.export.captured import fold_captured, is_captured, transform_captured

ALL = ("blocks.0", "blocks.1", "conv", "head")


@QUIET
@pytest.mark.parametrize("early", [False, True], ids=["as captured", "decomposed"])
def test_a_graph_module_is_trained_and_folded_in_place(early: bool) -> None:
    model, ids = mixed()
    program = capture(model, ids)
    module = (program.run_decompositions() if early else program).module()
    keys, code = list(module.state_dict()), module.code
    torch.manual_seed(7)
    assert transform_captured(module, config(*ALL, apply_GS=True)) is module
    torch.manual_seed(7)
    twin = transform_captured(program, config(*ALL, apply_GS=True))
    assert relative_error(module(ids), model(ids)) < 1e-12
    assert transform_captured(module, config(*ALL, apply_GS=True)) is module
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert list(trained) == [f"{path}.hra_u.default" for path in ALL]
    twin_module = twin.module()
    for run in (module, twin_module):
        optimizer = torch.optim.SGD([p for p in run.parameters() if p.requires_grad], lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            (run(ids) - normal(4, 3, 5, 10)).square().mean().backward()
            optimizer.step()
    for name, vectors in trained.items():
        assert relative_error(vectors, twin.state_dict[name]) < 1e-10
    output = module(ids)
    assert relative_error(output, model(ids)) > 1e-3
    fold_captured(module)
    assert relative_error(module(ids), output) < 1e-12
    # The head is untied from the embedding, which stays.
    assert torch.equal(module.emb.weight, model.emb.weight) and not torch.equal(module.head.weight, model.emb.weight)
    assert list(module.state_dict()) == keys
    assert module.code.count("\n") == code.count("\n")
    # The module of a program is folded alone.
    fold_captured(twin_module)
    assert relative_error(twin_module(ids), output) < 1e-9
    assert "head.hra_u.default" in twin.state_dict
    assert all(parameter.requires_grad for parameter in [*module.parameters(), *model.parameters()])
    assert all(torch.equal(program.state_dict[name], value) for name, value in model.state_dict().items())


def test_is_captured() -> None:
    model, ids = mixed()
    assert is_captured(capture(model, ids).module())
    assert is_captured(make_fx(nn.Linear(2, 2))(torch.ones(1, 2)))
    assert not is_captured(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))))
    assert not is_captured(model)


def test_a_graph_without_names_says_how_to_keep_them() -> None:
    module = make_fx(nn.Linear(2, 2))(torch.ones(1, 2))
    with pytest.raises(hra_fx.SelectionError) as caught:
        transform_captured(module, config("0"))
    assert "Its parameters are _param_constant0, _param_constant1. Capture the model with" in str(caught.value)


def test_a_refused_graph_module_stays_as_it_was() -> None:
    model, ids = mixed()
    module = capture(model, ids).module()
    code, keys = module.code, list(module.state_dict())
    for settings in (config("nothing"), config("emb"), config("conv", bias="all")):
        with pytest.raises(hra_fx.HRAError):
            transform_captured(module, settings)
    with pytest.raises(hra_fx.AdapterError, match="the graph has no reflections"):
        fold_captured(module)
    assert (module.code, list(module.state_dict())) == (code, keys)
    assert all(parameter.requires_grad for parameter in module.parameters())
