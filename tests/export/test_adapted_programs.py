"""Models whose layers rotate their weights: torch.compile, torch.export, and their graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layers.cases import Doubling
from layers.checking import assert_same, gradients, normal, pair, run_dense, vectors_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hra_fx
from hra_fx.errors import AdapterError, SelectionError


class Mixed(nn.Module):
    """A weight that others read, a layer with its own forward, an attention, a Conv1D and a plain Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.own, self.plain = nn.Linear(6, 6), Doubling(6, 6), nn.Linear(6, 4)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.columns = Conv1D(6, 6)
        self.conv = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.read.weight, self.read.bias))
        x = self.columns(self.own(x)) + F.linear(x, self.read.weight)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.plain(self.conv(x))


class MixedUntraced(Mixed):
    """A branch on a shape that fx cannot trace, and torch.export can."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(1 * x if x.shape[0] > 1 else x)


TARGETS = ["read", "own", "plain", "attn", "out_proj", "columns", "conv"]
CONFIG = hra_fx.HRAConfig(r=2, target_modules=["0"])
X = normal(1, 2, 3, 6)


def test_compiled_in_one_piece() -> None:
    base, model = pair(Mixed, TARGETS)
    torch._dynamo.reset()
    model.train()
    base.train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    leaves = list(vectors_of(model).values())
    got, wanted = compiled(X), run_dense(base, model, X)
    assert_same(got, wanted)
    for mine, oracle in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
        assert_same(mine, oracle, rtol=1e-8)
    model.eval()
    base.eval()
    with torch.no_grad():
        assert_same(compiled(X), run_dense(base, model, X))
        for vectors in leaves:
            vectors.mul_(-0.5).add_(0.3)
        assert_same(compiled(X), run_dense(base, model, X))


def test_exported() -> None:
    base, model = pair(MixedUntraced, TARGETS)
    program = torch.export.export(model, (X,))
    assert_same(program.module()(X), run_dense(base, model, X))
    names = [spec.target for spec in program.graph_signature.input_specs if spec.target]
    assert {f"{path}.hra_u.default" for path in vectors_of(model)} <= set(names)
    assert all(name in model.state_dict() for name in names)


def test_a_program_is_refused() -> None:
    program = torch.export.export(nn.Sequential(nn.Linear(6, 4)), (torch.ones(1, 6),))
    with pytest.raises(AdapterError, match=r"before torch\.export"):
        hra_fx.transform(program, CONFIG)  # type: ignore[type-var]
    with pytest.raises(SelectionError, match=r"matches 0 \(Module\), but only"):
        hra_fx.transform(program.module(), CONFIG)
