"""A training step in ExecuTorch and in a package of AOTInductor: losses and trained vectors are PyTorch's."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapting import adapted, randomise
from layers.checking import assert_same
from tiny_models import llama
from torch import Tensor, nn
from torch.export import Dim

import hra_fx

SHAPES = {name: {0: Dim("batch", min=2, max=4), 1: Dim("length", min=3, max=8)} for name in ("input_ids", "labels")}
STEPS, LR = 4, 0.5


base = partial(llama, vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1)


def trained_by_torch(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)
    losses = []
    for ids, labels in data:
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Messages of these packages about their own code.
@pytest.mark.filterwarnings("ignore")
def test_executorch_trains_the_vectors_and_peft_loads_them(tmp_path: Path) -> None:
    from executorch.exir import to_edge
    from executorch.extension.training import _load_for_executorch_for_training_from_buffer, get_sgd_optimizer

    model = adapted(base(), "q_proj", "v_proj", "down_proj", r=4, task_type="CAUSAL_LM")
    ids = [torch.randint(0, 16, (2 + step % 3, 4 + step)) for step in range(STEPS)]
    data = [(part, part) for part in ids]  # of several sizes
    program = hra_fx.export_training_step(model, dict(zip(SHAPES, data[0], strict=True)), dynamic_shapes=SHAPES)
    eager = copy.deepcopy(model)
    wanted = trained_by_torch(eager, data)
    buffer = to_edge(program).to_executorch().buffer  # the module reads this memory, so keep it
    module = _load_for_executorch_for_training_from_buffer(buffer)
    losses: list[float] = []
    optimizer: Any = None
    for batch in data:
        losses.append(module.forward_backward("forward", batch)[0].item())
        optimizer = optimizer or get_sgd_optimizer(module.named_parameters(), LR, 0.0, 0.0, 0.0, False)
        optimizer.step(module.named_gradients())
    assert_same(torch.tensor(losses), torch.tensor(wanted), rtol=1e-5)

    trained = {name: value.detach().clone() for name, value in module.named_parameters().items()}
    assert trained.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict({**model.state_dict(), **trained})
    hra_fx.save_adapter(model, tmp_path)
    ids = data[0][0]
    assert_same(peft.PeftModel.from_pretrained(base(), tmp_path)(ids).logits, eager(ids).logits, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_package_of_aotinductor_trains_the_parameters_of_the_model(tmp_path: Path) -> None:
    model = hra_fx.transform(nn.Sequential(nn.Linear(6, 4)), hra_fx.HRAConfig(r=2, target_modules=["0"]))
    randomise(model)
    x, labels = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    program = hra_fx.export_training_step(model, x, loss=nn.functional.cross_entropy, labels=labels)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
    package = torch._inductor.aoti_load_package(path)
    vectors = model.get_parameter("0.hra_u.default")
    package.load_constants({"0.hra_u.default": vectors.data}, check_full_update=False, user_managed=True)
    optimizer = torch.optim.AdamW([vectors], lr=0.1)
    hra_fx.train_pairs(optimizer, model)
    for _ in range(STEPS):
        loss, gradients = package(x, labels)
        wanted = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        wanted.backward()
        assert_same(loss, wanted, rtol=1e-5)
        assert_same(gradients["0.hra_u.default"], vectors.grad, rtol=1e-4)
        vectors.grad = gradients["0.hra_u.default"]
        optimizer.step()
