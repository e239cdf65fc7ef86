"""What a task gives: data, a pretrained model, a loss, and scores."""

from __future__ import annotations

import abc
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

import hra_fx

Batch = list[int]
#: What takes long to compute.
CACHE = Path(__file__).resolve().parents[3] / "build" / "learning"


class Task(abc.ABC):
    """One task with the training examples, the order of the batches and the new weights of one seed.

    Args:
        seed: draws the training examples, their order, and the weights that are new.
        tiny: a few examples and steps, for tests.
    """

    name: ClassVar[str]
    #: What the score is, and whether a larger one is better.
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    #: The layers that adapters change, as in `target_modules`.
    targets: ClassVar[list[str]]
    #: LoRA's rank. Other methods get the rank with the nearest number of parameters.
    lora_rank: ClassVar[int]
    #: How much larger LoRA's rank is in some of the targets. HRA has twice as many more vectors there.
    more_rank: ClassVar[dict[str, int]] = {}
    #: The parts of its change that a trained model keeps in evaluations of their own.
    scales: ClassVar[Sequence[float]] = ()
    #: The module that is new, which every method trains, and its learning rate.
    head: ClassVar[str | None] = None
    head_lr: ClassVar[float] = 0.0
    #: Examples in a batch, and passes over the examples.
    batch_size: ClassVar[int]
    epochs: ClassVar[int]
    #: Steps between two points of the record's curve; 0 for no curve.
    curve_steps: ClassVar[int] = 0
    #: Whether products with the base weights are in bfloat16 (`bfloat16.py`).
    bfloat16: ClassVar[bool] = False

    def __init__(self, seed: int, *, tiny: bool = False) -> None:
        """Read the data."""
        self.seed = seed
        self.tiny = tiny

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The number of training examples."""

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """The pretrained model, with a head that is new."""

    @abc.abstractmethod
    def model_inputs(self, batch: Batch) -> Any:
        """Some training examples as the model takes them: a tensor, or keyword arguments."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of some training examples, `()`."""

    @abc.abstractmethod
    def validate(self, model: nn.Module) -> float:
        """The score on the validation split, from which learning rates are chosen."""

    @abc.abstractmethod
    def test(self, model: nn.Module) -> float:
        """The score on the test split."""

    def retention(self, model: nn.Module) -> dict[str, float]:
        """Scores on what the pretrained model could do."""
        return {}

    def to_keep(self, count: int, kind: str = "", rows: int = 8) -> list[Any]:
        """Batches, as the model takes them, of samples of what it must not forget; none of them is tested.

        Args:
            count: the number of samples.
            kind: `"other"` for samples that differ from those that are tested, `"own"` for texts that the model wrote,
                `"random"` for random tokens.
            rows: the samples of a batch.
        """
        raise NotImplementedError(f"{self.name} has no samples to keep")

    def distance(self, model: nn.Module, batch: Any) -> Tensor:
        """The distance of the model from its base on a batch of samples to keep, `()`."""
        return hra_fx.distance_to_base(model, batch)

    def rehearsal_loss(self, model: nn.Module, step: int) -> Tensor:
        """The loss of the batch of samples to keep that is number `step`, `()`."""
        raise NotImplementedError(f"{self.name} has no rehearsal")

    def batches(self) -> list[Batch]:
        """The batches of all epochs, in an order that depends on the seed only."""
        order = random.Random(self.seed)
        batches = []
        for _ in range(1 if self.tiny else self.epochs):
            shuffled = order.sample(range(self.size), self.size)
            batches += [shuffled[start : start + self.batch_size] for start in range(0, self.size, self.batch_size)]
        return batches


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of the rows of logits `(n, classes)` whose largest one is that of the label, `(n,)`."""
    return 100 * float((logits.argmax(dim=1) == labels).double().mean())
