"""The example of PEFT's documentation for convolutions: "conv1" and "conv2" of torchvision's ResNet-50."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import torchvision
from integrations.models.zoo import folded_copy, randomise
from oracles import relative_error
from torch import Tensor, nn

import hra_fx

TARGETS = ["conv1", "conv2"]
#: Every Bottleneck has a conv1 and a conv2, and the model a conv1 of 7x7 with stride 2 before them.
PATHS = [
    "conv1",
    *(f"layer{i}.{j}.{name}" for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n) for name in TARGETS),
]


@pytest.fixture(scope="module")
def base() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    yield torchvision.models.resnet50(weights=None, num_classes=5).double().eval()


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def adapted(base: nn.Module, *, training: bool = False) -> nn.Module:
    torch.manual_seed(1)
    config = hra_fx.HRAConfig(r=2, target_modules=TARGETS, init_weights=True)
    return hra_fx.HRAModel(copy.deepcopy(base).train(training), config)


def trained(model: nn.Module, steps: int = 1) -> list[float]:
    """The losses of some steps of a classification, and of one more forward."""
    labels = torch.tensor([1, 3])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(steps + 1):
        loss = nn.functional.cross_entropy(model(images()), labels)
        losses.append(float(loss.detach()))
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses


@pytest.mark.parametrize("training", [False, True])
def test_a_trained_one_is_the_base_with_rotated_kernels(base: nn.Module, training: bool) -> None:
    model = adapted(base, training=training)
    losses = trained(model)
    assert losses[1] < losses[0]
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {f"{p}.hra_u.default" for p in PATHS}

    plain = folded_copy(base, model).train(training)
    for name, buffer in model.named_buffers():
        if ".hra_u." not in name:
            plain.get_buffer(name).copy_(buffer)
    assert relative_error(model(images()), plain(images())) < 1e-9
    assert relative_error(plain(images()), copy.deepcopy(base).train(training)(images())) > 1e-3

    folded = hra_fx.fold(model)
    assert type(folded) is torchvision.models.ResNet
    assert list(folded.state_dict()) == list(base.state_dict())
    for path in PATHS:
        weight, wanted = (each.get_parameter(f"{path}.weight") for each in (folded, plain))
        assert relative_error(weight, wanted) < 1e-12, path


def narrow() -> nn.Module:
    """A quarter as wide inside, for PEFT multiplies matrices as wide as the unfolded input of a layer: 4608 else."""
    torch.manual_seed(0)
    return torchvision.models.resnet50(weights=None, num_classes=5, width_per_group=16).eval()


def test_what_is_saved_is_opened_by_peft_and_by_us(tmp_path: Path) -> None:
    """PEFT is right in all these convolutions, unmerged too: square kernels, zeros, equal strides, one group."""
    base = narrow()
    model = adapted(base)
    randomise(model)
    x = images().float()
    wanted = model(x)
    assert relative_error(wanted, base(x)) > 1e-2
    assert isinstance(model, hra_fx.HRAModel)
    model.save_pretrained(tmp_path)

    again = hra_fx.HRAModel.from_pretrained(narrow(), tmp_path)
    assert torch.equal(again(x), wanted)

    theirs = peft.PeftModel.from_pretrained(narrow(), str(tmp_path))
    assert relative_error(theirs(x), wanted) < 1e-5
    theirs.merge_adapter()
    assert relative_error(theirs(x), wanted) < 1e-5


def test_what_peft_saves_is_opened_by_us(tmp_path: Path) -> None:
    config = peft.HRAConfig(r=2, target_modules=TARGETS, init_weights=False)
    theirs = peft.get_peft_model(narrow(), config).eval()
    theirs.save_pretrained(str(tmp_path))
    ours = hra_fx.HRAModel.from_pretrained(narrow(), tmp_path)
    x = images().float()
    assert relative_error(ours(x), theirs(x)) < 1e-5
    assert relative_error(theirs(x), narrow()(x)) > 1e-2
