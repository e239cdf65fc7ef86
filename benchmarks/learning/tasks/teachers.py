"""A synthetic task with a known answer: find how a teacher's weights differ from the base weights."""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from learning.tasks.task import Batch, Task

WIDTH, EXAMPLES, HELD_OUT = 64, 1024, 1024
#: Planes that the first teacher turns, and the rank of the second teacher's change.
PLANES = RANK = 4
#: The size of every teacher's change, relative to the base weight.
CHANGE = 0.5


class Teacher(Task):
    """An MLP of two layers learns the outputs of a changed copy of itself; the error in percent of their variance."""

    metric: ClassVar[str] = "error, %"
    higher_is_better: ClassVar[bool] = False
    targets: ClassVar[list[str]] = ["0", "2"]
    lora_rank: ClassVar[int] = 4
    batch_size: ClassVar[int] = 32
    epochs: ClassVar[int] = 20

    def __init__(self, seed: int, *, tiny: bool = False) -> None:
        """Draw the base model, the teacher, and the inputs."""
        super().__init__(seed, tiny=tiny)
        generator = torch.Generator().manual_seed(seed)
        self.base = mlp(generator)
        teacher = copy.deepcopy(self.base)
        with torch.no_grad():
            for name in self.targets:
                weight = teacher.get_submodule(name).weight
                weight.copy_(self.changed(weight, generator))
        count = 64 if tiny else EXAMPLES
        inputs = torch.randn(count + 2 * HELD_OUT, WIDTH, generator=generator)
        with torch.no_grad():
            self.inputs, self.outputs = inputs, teacher(inputs)
        self.count = count

    @property
    def size(self) -> int:
        """The number of training examples."""
        return self.count

    def changed(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """The teacher's weight."""
        raise NotImplementedError

    def model(self) -> nn.Module:
        """The base model. The adapters of each seed start elsewhere."""
        torch.manual_seed(self.seed)
        return copy.deepcopy(self.base)

    def model_inputs(self, batch: Batch) -> Tensor:
        """The inputs of the layer."""
        return self.inputs[batch]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean squared error."""
        return mse_loss(model(self.inputs[batch]), self.outputs[batch])

    def validate(self, model: nn.Module) -> float:
        """The error on 1024 inputs."""
        return self.error(model, slice(self.count, self.count + HELD_OUT))

    def test(self, model: nn.Module) -> float:
        """The error on 1024 others."""
        return self.error(model, slice(self.count + HELD_OUT, None))

    @torch.no_grad()
    def error(self, model: nn.Module, part: slice) -> float:
        """The mean squared error in percent of the variance."""
        wanted = self.outputs[part]
        return float(100 * mse_loss(model(self.inputs[part]), wanted) / wanted.var(dim=0).mean())


class RotatedTeacher(Teacher):
    """The teacher's weights are the base weights, rotated in 4 planes."""

    name: ClassVar[str] = "teacher-rotation"

    def changed(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """`W Q`, where `Q` turns each plane by the angle that gives the change its size."""
        basis = torch.linalg.qr(torch.randn(WIDTH, 2 * PLANES, generator=generator)).Q
        first, second = basis[:, ::2], basis[:, 1::2]
        # A turn changes a vector of the plane by 2 sin(angle / 2), and 2 PLANES of WIDTH directions lie in the planes.
        angle = 2 * math.asin(min(1.0, CHANGE / 2 / math.sqrt(2 * PLANES / WIDTH)))
        plane = first @ first.T + second @ second.T
        turn = (math.cos(angle) - 1) * plane + math.sin(angle) * (first @ second.T - second @ first.T)
        return weight + weight @ turn


class LowRankTeacher(Teacher):
    """A matrix of rank 4 is added to the base weights."""

    name: ClassVar[str] = "teacher-low-rank"

    def changed(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """`W + B A`."""
        left = torch.randn(len(weight), RANK, generator=generator)
        return weight + scaled(left @ torch.randn(RANK, WIDTH, generator=generator), weight)


class DenseTeacher(Teacher):
    """A random matrix of full rank is added to the base weights."""

    name: ClassVar[str] = "teacher-dense"

    def changed(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """`W + D`."""
        return weight + scaled(torch.randn(weight.shape, generator=generator), weight)


def scaled(change: Tensor, weight: Tensor) -> Tensor:
    """A change with the size that every teacher's change has."""
    return change * (CHANGE * weight.norm() / change.norm())


def mlp(generator: torch.Generator) -> nn.Sequential:
    """Two layers with random weights."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / math.sqrt(WIDTH))
            layer.bias.zero_()
    return model
