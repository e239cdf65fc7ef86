"""A training step in ExecuTorch, for batches of several sizes: losses and trained vectors are PyTorch's.

`tests/test_demos.py` trains a whole transformer, in ExecuTorch and in a package of AOTInductor.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapting import adapted
from layers.checking import assert_same
from torch import nn
from torch.export import Dim

import hra_fx

# They take long to compile a program, and tests/export/test_training_step.py compares what is in it.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # messages about their own code

STEPS, LR = 4, 0.5


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def test_executorch_trains_the_vectors_and_peft_loads_them(tmp_path: Path) -> None:
    from executorch.exir import to_edge
    from executorch.extension.training import _load_for_executorch_for_training_from_buffer, get_sgd_optimizer

    model = adapted(base(), "0", r=2)
    sizes = [2 + step % 3 for step in range(STEPS)]
    data = [(torch.randn(size, 6), torch.randint(0, 4, (size,))) for size in sizes]
    loss, batch = nn.functional.cross_entropy, {0: Dim("batch", min=2, max=4)}
    shapes = {"input": batch, "labels": batch}
    program = hra_fx.export_training_step(model, data[0][0], loss=loss, labels=data[0][1], dynamic_shapes=shapes)
    eager = copy.deepcopy(model)
    trained_by_torch = torch.optim.SGD([p for p in eager.parameters() if p.requires_grad], LR)
    buffer = to_edge(program).to_executorch().buffer  # the module reads this memory, so keep it
    module = _load_for_executorch_for_training_from_buffer(buffer)
    optimizer: Any = None
    for x, labels in data:
        wanted = loss(eager(x), labels)
        trained_by_torch.zero_grad()
        wanted.backward()
        trained_by_torch.step()
        assert_same(module.forward_backward("forward", (x, labels))[0], wanted, rtol=1e-5)
        optimizer = optimizer or get_sgd_optimizer(module.named_parameters(), LR, 0.0, 0.0, 0.0, False)
        optimizer.step(module.named_gradients())
    trained = {name: value.detach().clone() for name, value in module.named_parameters().items()}
    assert trained.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict({**model.state_dict(), **trained})
    hra_fx.save_adapter(model, tmp_path)
    x = data[0][0]
    assert_same(peft.PeftModel.from_pretrained(base(), tmp_path)(x), eager(x), rtol=1e-4)
