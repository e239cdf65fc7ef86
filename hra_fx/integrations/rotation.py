"""A callback of the transformers Trainer that logs the rotation angles of adapters."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hra_fx.errors import HRAWarning
from hra_fx.model.state import require_adapted_layers
from hra_fx.reporting.row import active_rotations, is_sharded, largest

if TYPE_CHECKING:
    from transformers import Trainer


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

    Raises:
        AdapterError: the model has no reflections (raised when the training begins).

    Example:
        >>> callback = RotationCallback()  # callback.add_to(trainer)
    """

    _on = False

    def add_to(self, trainer: Trainer) -> RotationCallback:
        """Add the callback to a Trainer, before its reporters, and return it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find out whether this process logs."""
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

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the angles to the logs of a training step. Evaluation and summary logs are not changed."""
        logs: dict[str, Any] = kwargs["logs"]
        if not self._on or "loss" not in logs:
            return
        entries = _entries(kwargs["model"])
        logs.update(entries)
        # The Trainer copied the logs before this call.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(entries)


def _entries(model: Any) -> dict[str, float]:
    """The log entries of the active adapters."""
    several = len({name for layer in require_adapted_layers(model).values() for name in layer.hra_u}) > 1
    entries = {}
    for adapter, rotations in active_rotations(model).items():
        end = f"/{adapter}" if several else ""
        entries["angle_mean_degrees" + end] = math.degrees(sum(each.mean_angle for each in rotations) / len(rotations))
        entries["angle_largest_degrees" + end] = math.degrees(largest(each.angle for each in rotations))
        entries["orthogonality_error" + end] = largest(each.orthogonality for each in rotations)
    return entries
