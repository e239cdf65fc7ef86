"""What training does to a model, in the logs of transformers' Trainer and as a plot at its end.

The Trainer hands its callbacks the logs in their order, and those that report (TensorBoard, Weights & Biases, ...)
stand before the user's. So this one goes to the front before the training begins; no argument that a callback is given
leads to the list of them, only the object that calls it.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hra_fx.errors import HRAWarning
from hra_fx.model.state import require_sites
from hra_fx.reporting.plots.canvas import check_plot
from hra_fx.reporting.plots.training import draw_training
from hra_fx.reporting.progress import Progress, is_sharded, progress_of

_MEAN, _LARGEST, _ERROR = "angle_mean_degrees", "angle_largest_degrees", "orthogonality_error"


class RotationCallback(TrainerCallback):
    """Logs how far the layers are turned, whenever the Trainer logs a training loss, to whatever it reports to.

    The logs, and `trainer.state.log_history`, get for the active adapter

    - `angle_mean_degrees`: the mean over the layers of each layer's mean angle;
    - `angle_largest_degrees`: the largest angle of all layers;
    - `orthogonality_error`: the largest `|Q^T Q - I|_F`, which is rounding, and stays small.

    In a model with several adapters each key ends in `/<adapter>`. It reads the vectors only, on the first process;
    where a process holds shards of them (FSDP, DeepSpeed ZeRO-3) it warns, and logs nothing.

    Args:
        plot: a file for a plot of the whole training at its end, ending in `.svg`, `.png` or `.pdf`; needs matplotlib.

    Attributes:
        history: the points so far as `Progress`, one for each adapter and logged step, and for the start and the end;
            after a resumed training those of the part before too, as far as the logs have them.

    Raises:
        VisualizeError: a plot that cannot be written: another ending, no such folder, or no matplotlib.
        AdapterError: when the training begins, the model has no reflections.

    Example:
        >>> callback = RotationCallback()  # Trainer(model, ..., callbacks=[callback])
        >>> callback.history
        []
    """

    def __init__(self, plot: str | os.PathLike[str] | None = None) -> None:
        """Check the name of the plot, before hours of training."""
        self.plot: Path | None = None
        if plot is not None:
            self.plot = check_plot(plot)
        self.history: list[Progress] = []
        self._on = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go to the front of the callbacks, and look at the start."""
        model = kwargs["model"]
        require_sites(model)
        self._on = state.is_world_process_zero and not is_sharded(model)
        if state.is_world_process_zero and not self._on:
            warnings.warn(
                "RotationCallback: this process holds only shards of the vectors, so that no angle can be told; "
                "nothing is logged. Train with DDP, or call hra_fx.report on the gathered model.",
                HRAWarning,
                stacklevel=2,
            )
        if not self._on:
            return
        self._go_first()
        self.history = _restored(state.log_history, _adapters(model))
        if not state.global_step:
            self.history = progress_of(model, 0)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the numbers to the logs of a training step; those of evaluations and summaries are let be."""
        logs: dict[str, Any] = kwargs["logs"]
        if not self._on or "loss" not in logs:
            return
        points = progress_of(kwargs["model"], state.global_step)
        entries = _entries(points, suffixed=len(_adapters(kwargs["model"])) > 1)
        logs.update(entries)
        # The Trainer keeps a copy that it made before it called.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(entries)
        self._add(points, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the end, and write the plot."""
        if not self._on:
            return
        self._add(progress_of(kwargs["model"], state.global_step), state.global_step)
        if self.plot is not None:
            try:
                draw_training(self.history, self.plot)
            except Exception as error:  # a plot is no reason to lose a trained model
                text = f"RotationCallback: {self.plot} could not be written ({error}). Its numbers are in history."
                warnings.warn(text, HRAWarning, stacklevel=2)

    def _add(self, points: list[Progress], step: int) -> None:
        """The points of a step, in place of those that it had."""
        self.history = [point for point in self.history if point.step != step] + points

    def _go_first(self) -> None:
        frame = sys._getframe(1)
        while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is None:
            warnings.warn(
                "RotationCallback: it was not called by transformers' CallbackHandler, and cannot go before the "
                "callbacks that report. The angles are in trainer.state.log_history and in history.",
                HRAWarning,
                stacklevel=2,
            )
            return
        callbacks = frame.f_locals["self"].callbacks
        # What is called after this one keeps its place, also in the loop that calls them right now.
        callbacks.remove(self)
        callbacks.insert(0, self)


def _adapters(model: Any) -> list[str]:
    return list(dict.fromkeys(name for layer in require_sites(model).values() for name in layer.hra_u))


def _entries(points: list[Progress], *, suffixed: bool) -> dict[str, float]:
    """The entries of a log."""
    entries = {}
    for point in points:
        end = f"/{point.adapter}" if suffixed else ""
        entries[_MEAN + end] = math.degrees(point.mean_angle)
        entries[_LARGEST + end] = math.degrees(point.angle)
        entries[_ERROR + end] = point.orthogonality
    return entries


def _restored(log_history: list[dict[str, Any]], adapters: list[str]) -> list[Progress]:
    """The points that a log tells of; keys without a name are of the first adapter."""
    points = []
    for entry in log_history:
        for key in entry:
            name, _, adapter = key.partition("/")
            if name == _MEAN:
                end = key[len(_MEAN) :]
                mean, largest = (math.radians(entry[part + end]) for part in (_MEAN, _LARGEST))
                points.append(Progress(entry["step"], adapter or adapters[0], mean, largest, entry[_ERROR + end]))
    return points
