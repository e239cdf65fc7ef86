"""The example of PEFT's documentation for convolutions: "conv1" and "conv2" of torchvision's ResNet-50."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import torch
import torchvision
from oracles import relative_error
from torch import Tensor, nn
from zoo.oracle import Oracle, randomise, vectors_of

import hra_fx

TARGETS = ["conv1", "conv2"]
#: Every Bottleneck has a conv1 and a conv2, and the model a conv1 of 7x7 with stride 2 before them.
PATHS = [
    "conv1",
    *(f"layer{i}.{j}.{name}" for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n) for name in TARGETS),
]


def resnet(**options: int) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet50(weights=None, num_classes=5, **options).eval()


def narrow() -> nn.Module:
    """A quarter as wide inside: PEFT multiplies matrices as wide as the unfolded input of a layer, 4608 otherwise."""
    return resnet(width_per_group=16)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapted(base: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return hra_fx.HRAModel(copy.deepcopy(base), hra_fx.HRAConfig(r=2, target_modules=TARGETS))


def test_a_trained_model_is_the_base_with_rotated_kernels() -> None:
    base, x, labels = resnet().double(), images(torch.float64), torch.tensor([1, 3])
    model = adapted(base).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = nn.functional.cross_entropy(model(x), labels)
    before.backward()
    optimizer.step()
    assert nn.functional.cross_entropy(model(x), labels) < before
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {f"{p}.hra_u.default" for p in PATHS}

    plain = Oracle(base, model).plain.train()
    for name, buffer in model.named_buffers():
        if ".hra_u." not in name:
            plain.get_buffer(name).copy_(buffer)
    assert relative_error(model(x), plain(x)) < 1e-9
    assert relative_error(plain(x), copy.deepcopy(base).train()(x)) > 1e-3

    folded = hra_fx.fold(model)
    assert type(folded) is torchvision.models.ResNet
    assert list(folded.state_dict()) == list(base.state_dict())
    for path in PATHS:
        weight, wanted = (each.get_parameter(f"{path}.weight") for each in (folded, plain))
        assert relative_error(weight, wanted) < 1e-12, path


def test_files_go_both_ways_between_peft_and_us(tmp_path: Path) -> None:
    """PEFT is right in all these convolutions, also unmerged: square kernels, zeros, equal strides, one group."""
    base, x = narrow(), images()
    model = adapted(base)
    randomise(model)
    assert list(vectors_of(model)) == PATHS
    wanted = model(x)
    assert relative_error(wanted, base(x)) > 1e-2
    assert isinstance(model, hra_fx.HRAModel)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(hra_fx.HRAModel.from_pretrained(narrow(), tmp_path / "ours")(x), wanted)
    theirs = peft.PeftModel.from_pretrained(narrow(), str(tmp_path / "ours"))
    assert relative_error(theirs(x), wanted) < 1e-5
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert relative_error(hra_fx.HRAModel.from_pretrained(narrow(), tmp_path / "theirs")(x), wanted) < 1e-5
    theirs.merge_adapter()
    assert relative_error(theirs(x), wanted) < 1e-5
