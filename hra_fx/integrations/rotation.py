"""A callback of the transformers Trainer that logs the rotation angles of adapters."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hra_fx.errors import HRAWarning
from hra_fx.model.state import require_adapted_layers
from hra_fx.reporting.plots import check_plot, draw_training
from hra_fx.reporting.row import Progress, is_sharded, progress_of

if TYPE_CHECKING:
    from transformers import Trainer

_MEAN, _LARGEST, _ERROR = "angle_mean_degrees", "angle_largest_degrees", "orthogonality_error"


class RotationCallback(TrainerCallback):
    """Logs the rotation angles of the adapted layers with each training loss.

    A Trainer calls its reporters (TensorBoard, wandb) before the callbacks that it is given. For reporters to get the
    angles too, call `add_to` instead of passing the callback to the Trainer.

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
        >>> callback = RotationCallback()  # callback.add_to(trainer)
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

    def add_to(self, trainer: Trainer) -> RotationCallback:
        """Add the callback to a Trainer, before its reporters, and return it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the start."""
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
