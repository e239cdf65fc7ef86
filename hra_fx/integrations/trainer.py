"""A transformers Trainer that trains HRA in pairs, optionally with the regularizer of the paper, and two callbacks."""

from __future__ import annotations

import gc
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hra_fx.errors import ConfigError, HRAWarning
from hra_fx.model.orthogonality import orthogonality_loss
from hra_fx.model.pairs import check_difference, refuse_states_of_pairs, train_pairs_if_possible
from hra_fx.model.state import require_adapted_layers
from hra_fx.reporting.plots import check_plot, draw_training
from hra_fx.reporting.row import Progress, is_sharded, progress_of

_MEAN, _LARGEST, _ERROR = "angle_mean_degrees", "angle_largest_degrees", "orthogonality_error"


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
        pair_difference: `difference` of `train_pairs`. It is also used for an optimizer that you pass, unless that
            optimizer already trains pairs. With `None`, the optimizer updates the vectors, as in the standard Trainer.
            To continue a checkpoint, pass the value that it was trained with; for a checkpoint of the standard Trainer,
            pass `None`.

    Raises:
        ConfigError: the weight is not a finite number >= 0, or `pair_difference` is neither `None` nor a finite number
            > 0.
        AdapterError: the weight is positive, but the model has no reflections (raised at the first training step).

    Warns:
        HRAWarning: see `train_pairs`.

    Example:
        >>> HRATrainer(orthogonality_weight=-1.0)
        Traceback (most recent call last):
        hra_fx.errors.ConfigError: `orthogonality_weight` must be a finite number >= 0, got -1.0. Use 0.0 to ...
    """

    def __init__(
        self, *args: Any, orthogonality_weight: float = 0.0, pair_difference: float | None = 0.1, **kwargs: Any
    ) -> None:
        """Check the two numbers. Other arguments are passed to the Trainer."""
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
        self.pair_difference = pair_difference
        self.orthogonality_weight = float(orthogonality_weight)
        self._sum_since_log: Tensor | float = 0.0
        self._terms_since_log = 0

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer of the Trainer, which trains pairs unless `pair_difference` is `None`."""
        optimizer = super().create_optimizer(*args, **kwargs)
        model: Any = self.model
        if self.pair_difference is not None:
            train_pairs_if_possible(optimizer, model, self.pair_difference)
        elif isinstance(optimizer, torch.optim.Optimizer):
            refuse_states_of_pairs(optimizer)
        return optimizer

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


class PairCallback(TrainerCallback):
    """Calls `hra_fx.train_pairs` when a Trainer (of transformers, TRL or others) begins to train.

    Args:
        difference: as in `train_pairs`.

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

    def __init__(self, difference: float = 0.1) -> None:
        """Check `difference`."""
        check_difference(difference)
        self.difference = difference

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the optimizer train pairs. At this point, its state is already loaded."""
        train_pairs_if_possible(kwargs["optimizer"], kwargs["model"], self.difference)


class RotationCallback(TrainerCallback):
    """Logs the rotation angles of the adapted layers with each training loss, for all reporters of the Trainer.

    For the active adapter, the logs and `trainer.state.log_history` contain

    - `angle_mean_degrees`: the mean of the mean angles of all layers;
    - `angle_largest_degrees`: the largest angle of all layers;
    - `orthogonality_error`: the largest `|Q^T Q - I|_F`, a rounding error.

    In a model with several adapters, each key ends in `/<adapter>`. Only the vectors are read, in the first process. If
    they are sharded (FSDP, DeepSpeed ZeRO-3), the callback warns and does not log angles.

    Args:
        plot: a `.svg`, `.png` or `.pdf` file for a plot of the whole training; needs matplotlib.

    Attributes:
        history: one `Progress` for each adapter and logged step, and for the start and the end. If training is resumed,
            it includes the points from the previous logs.

    Raises:
        VisualizeError: the plot cannot be written: unknown extension, missing folder, or matplotlib is not installed.
        AdapterError: the model has no reflections (raised when the training begins).

    Example:
        >>> callback = RotationCallback()  # Trainer(model, ..., callbacks=[callback])
        >>> callback.history
        []
    """

    def __init__(self, plot: str | os.PathLike[str] | None = None) -> None:
        """Check the path of the plot before training starts."""
        self.plot: Path | None = None
        if plot is not None:
            self.plot = check_plot(plot)
        self.history: list[Progress] = []
        self._on = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move to the front of the callbacks, and record the start."""
        model = kwargs["model"]
        require_adapted_layers(model)
        self._on = state.is_world_process_zero and not is_sharded(model)
        if state.is_world_process_zero and not self._on:
            warnings.warn(
                "RotationCallback: the vectors are sharded, so angles cannot be computed and are not logged. Train "
                "with DDP, or call hra_fx.report on the gathered model.",
                HRAWarning,
                stacklevel=2,
            )
        if not self._on:
            return
        self._move_to_front()
        self.history = _restored(state.log_history, _adapters(model))
        if not state.global_step:
            self.history = progress_of(model, 0)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the angles to the logs of a training step. Evaluation and summary logs are not changed."""
        logs: dict[str, Any] = kwargs["logs"]
        if not self._on or "loss" not in logs:
            return
        points = progress_of(kwargs["model"], state.global_step)
        entries = _entries(points, suffixed=len(_adapters(kwargs["model"])) > 1)
        logs.update(entries)
        # The Trainer copied the logs before this call.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(entries)
        self._add(points, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the end, and write the plot."""
        if not self._on:
            return
        self._add(progress_of(kwargs["model"], state.global_step), state.global_step)
        if self.plot is not None:
            try:
                draw_training(self.history, self.plot)
            except Exception as error:  # a failed plot must not lose a trained model
                text = f"RotationCallback: {self.plot} could not be written ({error}). The values are in `history`."
                warnings.warn(text, HRAWarning, stacklevel=2)

    def _add(self, points: list[Progress], step: int) -> None:
        """Set the points of a step."""
        self.history = [point for point in self.history if point.step != step] + points

    def _move_to_front(self) -> None:
        # Callbacks do not get a reference to the handler that calls them, so find the handler by its contents.
        for one in gc.get_objects():
            if issubclass(type(one), CallbackHandler) and self in one.callbacks:
                # Later callbacks keep their positions, even in a loop over the list that is currently running.
                one.callbacks.remove(self)
                one.callbacks.insert(0, self)


def _adapters(model: Any) -> list[str]:
    return list(dict.fromkeys(name for layer in require_adapted_layers(model).values() for name in layer.hra_u))


def _entries(points: list[Progress], *, suffixed: bool) -> dict[str, float]:
    """The log entries of some points."""
    entries = {}
    for point in points:
        end = f"/{point.adapter}" if suffixed else ""
        entries[_MEAN + end] = math.degrees(point.mean_angle)
        entries[_LARGEST + end] = math.degrees(point.angle)
        entries[_ERROR + end] = point.orthogonality
    return entries


def _restored(log_history: list[dict[str, Any]], adapters: list[str]) -> list[Progress]:
    """Read the points in a log. Keys without an adapter name belong to the first adapter."""
    points = []
    for entry in log_history:
        for key in entry:
            name, _, adapter = key.partition("/")
            if name == _MEAN:
                end = key[len(_MEAN) :]
                mean, largest = (math.radians(entry[part + end]) for part in (_MEAN, _LARGEST))
                points.append(Progress(entry["step"], adapter or adapters[0], mean, largest, entry[_ERROR + end]))
    return points
