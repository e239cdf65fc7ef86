"""Blocks under another grad mode or under autocast, in captured graphs and in their pickles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_modules import COPIES
from layers.checking import assert_same, gradients, randomise, vectors_of
from torch import Tensor
from torch.export import Dim
from tracing.graph_mode import X, config
from tracing.models import Two

import hra_fx


class Blocks(Two):
    def middle(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            scale = hidden.abs().mean()
            with torch.autocast("cpu", torch.bfloat16):
                scale = scale * (hidden.float() @ hidden.float().T).double().mean()
        return hidden * torch.sigmoid(scale)


@pytest.mark.parametrize("copied", COPIES, ids=["copy", "pickle", "save"])
def test_copies_of_a_graph_keep_the_context_of_its_blocks(copied: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    base = Blocks().double()
    eager = hra_fx.transform(copy.deepcopy(base), config())
    randomise(eager)
    graph = hra_fx.transform(base, config(), trace=True, example_inputs=X, dynamic_shapes=({0: Dim.AUTO},))
    graph.load_state_dict(eager.state_dict())
    found, wanted = copied(graph), eager(X)
    output = found(X)
    assert_same(output, wanted)
    leaves = [list(vectors_of(model).values()) for model in (found, eager)]
    for one, other in zip(gradients(output, leaves[0]), gradients(wanted, leaves[1]), strict=True):
        assert_same(one, other, rtol=1e-8)
