"""A transformers Trainer that trains HRA in pairs, with an optional regularizer, and callbacks for other Trainers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hra_fx.errors import AdapterError, ConfigError
from hra_fx.model.orthogonality import orthogonality_loss
from hra_fx.training.pairs import check_difference, refuse_states_of_pairs, train_pairs_if_possible
from hra_fx.training.protect import directions_of, is_protecting, protect, refuse_protected_states


class HRATrainer(Trainer):
    """A transformers Trainer that trains the vectors in pairs (`hra_fx.train_pairs`).

    `orthogonality_weight * orthogonality_loss(model)` is added to the training loss once per optimizer step, for any
    `gradient_accumulation_steps`, but not during evaluation. Training logs contain the mean of the term without its
    weight since the last log, as `orthogonality`.

    Use weight 0 with sharding that splits the vectors outside of the forward pass (DeepSpeed ZeRO-3, FSDP1). FSDP2
    works.

    Args:
        args, kwargs: arguments of `transformers.Trainer`.
        orthogonality_weight: the weight, finite and >= 0; 0 adds no term.
        protect: a dataset of what the model must not forget. The vectors stay orthogonal to the main directions of its
            inputs (`hra_fx.protect`). A few dozen examples are enough; the model runs all of them when the training
            begins.
        protected_directions: `directions` of `hra_fx.protect`.
        previously_protected: `previous` of `hra_fx.protect`: `protected` of the trainer of the previous task.
        pair_difference: `difference` of `train_pairs`. It is also used for an optimizer that you pass, unless that
            optimizer already trains pairs. With `None`, the optimizer updates the vectors, as in the standard Trainer.
            To continue a checkpoint, pass the value that it was trained with; for a checkpoint of the standard Trainer,
            pass `None`.
        quiet_directions: `directions` of `train_pairs`, for the first examples of the training data; 0 for none.

    Raises:
        ConfigError: the weight is not a finite number >= 0, or `pair_difference` is neither `None` nor a finite number
            > 0; or directions are to be protected by an optimizer that already protects others.
        AdapterError: the weight is positive, but the model has no reflections (raised at the first training step).

    Warns:
        HRAWarning: see `train_pairs`.

    Example:
        >>> HRATrainer(orthogonality_weight=-1.0)
        Traceback (most recent call last):
        hra_fx.errors.ConfigError: `orthogonality_weight` must be a finite number >= 0, got -1.0. Use 0.0 to ...
    """

    def __init__(
        self,
        *args: Any,
        orthogonality_weight: float = 0.0,
        pair_difference: float | None = 0.1,
        quiet_directions: int = 0,
        protect: Any = None,
        protected_directions: int = 16,
        previously_protected: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the numbers. Other arguments are passed to the Trainer."""
        if (
            isinstance(orthogonality_weight, bool)
            or not isinstance(orthogonality_weight, (int, float))
            or not 0 <= orthogonality_weight < math.inf
        ):
            raise ConfigError(
                f"`orthogonality_weight` must be a finite number >= 0, got {orthogonality_weight!r}. Use 0.0 to "
                "disable the term, or a small value such as 1e-6."
            )
        if pair_difference is not None:
            check_difference(pair_difference, "pair_difference")
        super().__init__(*args, **kwargs)
        if is_protecting(self.optimizer) and (protect is not None or previously_protected is not None):
            raise ConfigError(
                "the optimizer that you pass already protects directions, so `protect` and `previously_protected` must "
                "be None. Pass them to hra_fx.protect instead."
            )
        self.pair_difference, self.quiet_directions = pair_difference, quiet_directions
        self.protect, self.protected_directions = protect, protected_directions
        self.previously_protected = previously_protected
        self.orthogonality_weight = float(orthogonality_weight)
        self._sum_since_log: Tensor | float = 0.0
        self._terms_since_log = 0

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer of the Trainer, which trains pairs unless `pair_difference` is `None`."""
        optimizer = super().create_optimizer(*args, **kwargs)
        model: Any = self.model
        if self.pair_difference is not None:
            batches = _first_batches(self.get_train_dataloader()) if self.quiet_directions else None
            train_pairs_if_possible(optimizer, model, self.pair_difference, batches, self.quiet_directions)
        elif isinstance(optimizer, torch.optim.Optimizer):
            refuse_states_of_pairs(optimizer)
        previous, keeps = self.previously_protected, self.protect is not None
        if (keeps or previous is not None) and not is_protecting(optimizer):
            samples = self.get_test_dataloader(self.protect) if keeps else None
            protect(optimizer, model, samples, self.protected_directions, previous)
        elif not keeps and isinstance(optimizer, torch.optim.Optimizer):
            refuse_protected_states(optimizer)
        return optimizer

    @property
    def protected(self) -> dict[str, Tensor]:
        """What `hra_fx.protect` returned when the training began, for `previously_protected` of the next task.

        Raises:
            AdapterError: nothing is protected yet.
        """
        return directions_of(self.optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the loss of the Trainer, and add the term in a training step."""
        computed = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Evaluations run without gradients, even in training mode.
        if not (self.orthogonality_weight and model.training and torch.is_grad_enabled()):
            return computed
        loss, outputs = computed if isinstance(computed, tuple) else (computed, None)
        term = orthogonality_loss(model)
        self._sum_since_log = self._sum_since_log + term.detach()
        self._terms_since_log += 1
        # Only the training loop sets it; other calls are for one batch.
        batches = getattr(self, "current_gradient_accumulation_steps", 1)
        share = 1 if self._divides_the_loss(num_items_in_batch) else batches
        loss = loss + (self.orthogonality_weight / share) * term.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _divides_the_loss(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether `Trainer.training_step` will divide the loss by the number of accumulated batches."""
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if is_scaled is not None:
            return not is_scaled
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return not by_model and self.compute_loss_func is None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values, and add the mean of the term to training logs."""
        if "loss" in logs and self._terms_since_log:
            logs["orthogonality"] = float(self._sum_since_log) / self._terms_since_log
            self._sum_since_log, self._terms_since_log = 0.0, 0
        super().log(logs, start_time)


def _first_batches(loader: Any) -> list[Any]:
    """The first 16 examples, in batches of 4.

    The loader is not iterated, because accelerate regards a loader as active until it is exhausted.
    """
    data = loader.dataset
    rows = (
        list(itertools.islice(data, 16))
        if isinstance(data, IterableDataset)
        else [data[i] for i in range(min(len(data), 16))]
    )
    return [loader.collate_fn(rows[start : start + 4]) for start in range(0, len(rows), 4)]


class PairCallback(TrainerCallback):
    """Calls `hra_fx.train_pairs` when a Trainer (of transformers, TRL or others) begins to train.

    Args:
        difference: as in `train_pairs`.
        quiet_directions: `directions` of `train_pairs`, for the first examples of the training data; 0 for none.

    Raises:
        ConfigError: `difference` is not a finite number > 0.
        AdapterError: see `train_pairs` (raised when the training begins).

    Warns:
        HRAWarning: see `train_pairs`; also if a tool flattened the parameters (FSDP1, DeepSpeed ZeRO).

    Example:
        >>> callback = PairCallback()  # Trainer(model, ..., callbacks=[callback])
        >>> callback.difference
        0.1
    """

    def __init__(self, difference: float = 0.1, quiet_directions: int = 0) -> None:
        """Check `difference`."""
        check_difference(difference)
        self.difference, self.quiet_directions = difference, quiet_directions

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the optimizer train pairs. At this point, its state is already loaded."""
        batches = _first_batches(kwargs["train_dataloader"]) if self.quiet_directions else None
        train_pairs_if_possible(kwargs["optimizer"], kwargs["model"], self.difference, batches, self.quiet_directions)


class ProtectCallback(TrainerCallback):
    """Calls `hra_fx.protect` when a Trainer (of transformers, TRL or others) begins to train.

    Args:
        batches: as in `protect`.
        directions: as in `protect`.
        previous: as in `protect`; `protected` of the callback of the previous task.

    Raises:
        AdapterError: see `protect` (raised when the training begins).

    Example:
        >>> batches = [{"input_ids": torch.tensor([[5, 2]])}]
        >>> callback = ProtectCallback(batches)  # Trainer(model, ..., callbacks=[callback])
        >>> callback.directions
        16
    """

    def __init__(
        self, batches: Iterable[Any] | None, directions: int = 16, previous: Mapping[str, Tensor] | None = None
    ) -> None:
        """Store the arguments."""
        self.batches, self.directions, self.previous = batches, directions, previous
        self._protected: dict[str, Tensor] | None = None

    @property
    def protected(self) -> dict[str, Tensor]:
        """What `protect` returned when the training began.

        Raises:
            AdapterError: nothing is protected yet.
        """
        if self._protected is None:
            raise AdapterError("the callback does not protect any directions yet. Train first.")
        return self._protected

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Protect the directions. They are the same when a training is resumed, because the base model runs."""
        optimizer, model = kwargs["optimizer"], kwargs["model"]
        self._protected = protect(optimizer, model, self.batches, self.directions, self.previous)
