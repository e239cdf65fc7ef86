"""A ResNet-18 that knows the digits 0 to 4, and learns 5 to 9 from few images."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import ClassVar

import torch
from resnet_mnist import Digits, load, resnet
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from learning.tasks.task import CACHE, Batch, Task, accuracy

IMAGES, VALIDATION = 100, 400


class FewDigits(Task):
    """ResNet-18, 100 images of 5 to 9, 30 passes; percent of held-out images whose digit is found.

    What it retains: the accuracy on 0 to 4, with the head that was trained on them.
    """

    name: ClassVar[str] = "digits"
    metric: ClassVar[str] = "accuracy, %"
    higher_is_better: ClassVar[bool] = True
    targets: ClassVar[list[str]] = ["conv1", "conv2", "downsample.0", "fc.0"]
    lora_rank: ClassVar[int] = 7
    head: ClassVar[str | None] = "fc.2"
    head_lr: ClassVar[float] = 3e-3
    batch_size: ClassVar[int] = 20
    epochs: ClassVar[int] = 30

    def __init__(self, seed: int, *, tiny: bool = False) -> None:
        """Draw the images of this seed; the split into training, validation and test is that of every seed."""
        super().__init__(seed, tiny=tiny)
        self.known, new = load()
        pool = len(new.labels) // 2
        chosen = random.Random(seed).sample(range(VALIDATION, pool), 20 if tiny else IMAGES)
        self.examples = Digits(new.images[chosen], new.labels[chosen])
        few = 20 if tiny else None
        self.held_out = Digits(new.images[:VALIDATION][:few], new.labels[:VALIDATION][:few])
        self.unseen = Digits(new.images[pool:][:few], new.labels[pool:][:few])
        self.known_unseen = Digits(self.known.images[2000:][:few], self.known.labels[2000:][:few])

    @property
    def size(self) -> int:
        """The number of training images."""
        return len(self.examples.labels)

    def model(self) -> nn.Module:
        """The pretrained network with a new head. BatchNorm keeps the statistics of 0 to 4."""
        torch.manual_seed(self.seed)
        model = resnet().eval()
        if not self.tiny:
            model.load_state_dict(pretrained())
        torch.manual_seed(self.seed)
        model.fc[2] = nn.Linear(128, 5)
        return model

    def model_inputs(self, batch: Batch) -> Tensor:
        """The images."""
        return self.examples.images[batch]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy."""
        return cross_entropy(model(self.model_inputs(batch)), self.examples.labels[batch])

    def validate(self, model: nn.Module) -> float:
        """Accuracy on 400 images of 5 to 9."""
        return score(model, self.held_out)

    def test(self, model: nn.Module) -> float:
        """Accuracy on 1250 images of 5 to 9."""
        return score(model, self.unseen)

    def retention(self, model: nn.Module) -> dict[str, float]:
        """Accuracy on 500 images of 0 to 4, with their head."""
        with self.known_head(model):
            return {"accuracy on 0 to 4, %": score(model, self.known_unseen)}

    @contextmanager
    def known_head(self, model: nn.Module) -> Iterator[None]:
        """Context manager in which the model has the head of the digits 0 to 4, frozen."""
        new, model.fc[2] = model.fc[2], nn.Linear(128, 5).requires_grad_(False)
        if not self.tiny:
            state = pretrained()
            model.fc[2].load_state_dict({"weight": state["fc.2.weight"], "bias": state["fc.2.bias"]})
        yield
        model.fc[2] = new

    def to_keep(self, count: int, kind: str = "", rows: int = 8) -> list[Tensor]:
        """Images of 0 to 4 that are not tested."""
        return list(self.known.images[: min(count, 2000)].split(rows))

    def rehearsal_loss(self, model: nn.Module, step: int) -> Tensor:
        """Cross entropy of images of 0 to 4, with their head."""
        rows = torch.arange(64).roll(-step * self.batch_size)[: self.batch_size]
        with self.known_head(model):
            return cross_entropy(model(self.known.images[rows]), self.known.labels[rows])


@cache
def pretrained() -> dict[str, Tensor]:
    """The state of the network that was trained on 2000 images of 0 to 4; kept in a file."""
    file = CACHE / "resnet.pt"
    if not file.exists():
        torch.manual_seed(0)
        model = resnet()
        known, _ = load()[0].split(2000)
        train_from_scratch(model, known)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    state: dict[str, Tensor] = torch.load(file)
    return state


def train_from_scratch(model: nn.Module, digits: Digits) -> None:
    """Three passes over the images, with BatchNorm in training mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    model.train()
    order = torch.Generator().manual_seed(0)
    for _ in range(3):
        for batch in torch.randperm(len(digits.labels), generator=order).split(32):
            optimizer.zero_grad()
            cross_entropy(model(digits.images[batch]), digits.labels[batch]).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def score(model: nn.Module, digits: Digits) -> float:
    """Accuracy in percent."""
    return accuracy(torch.cat([model(part) for part in digits.images.split(128)]), digits.labels)
