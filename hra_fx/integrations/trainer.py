"""The Trainer of transformers, with the paper's regulariser as one more argument.

Without the regulariser the stock Trainer does all that is needed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hra_fx.errors import ConfigError
from hra_fx.model.orthogonality import orthogonality_loss


class HRATrainer(Trainer):
    """The transformers Trainer, which adds `orthogonality_weight * orthogonality_loss(model)` to the training loss.

    The term counts once per optimiser step, whatever `gradient_accumulation_steps` is, and never in an evaluation. The
    training logs get its unweighted mean since the last one as `orthogonality`.

    Sharding that takes the vectors apart outside of the forward pass (DeepSpeed ZeRO-3, the older FSDP) needs weight 0;
    FSDP2 does not.

    Args:
        args, kwargs: those of `transformers.Trainer`.
        orthogonality_weight: the weight, finite and >= 0; with 0 this is the stock Trainer.

    Raises:
        ConfigError: the weight cannot be used.
        AdapterError: at the first training step, the weight is positive and the model has no reflections.

    Example:
        >>> HRATrainer(orthogonality_weight=-1.0)
        Traceback (most recent call last):
        hra_fx.errors.ConfigError: orthogonality_weight: -1.0 is no finite number >= 0. Give 0.0 for no term, or ...
    """

    def __init__(self, *args: Any, orthogonality_weight: float = 0.0, **kwargs: Any) -> None:
        """Check the weight; the rest is transformers'."""
        if (
            isinstance(orthogonality_weight, bool)
            or not isinstance(orthogonality_weight, (int, float))
            or not 0 <= orthogonality_weight < math.inf
        ):
            raise ConfigError(
                f"orthogonality_weight: {orthogonality_weight!r} is no finite number >= 0. Give 0.0 for no term, or a "
                "positive float such as 1e-6."
            )
        super().__init__(*args, **kwargs)
        self.orthogonality_weight = float(orthogonality_weight)
        self._sum_since_log: Tensor | float = 0.0
        self._terms_since_log = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The Trainer's loss, and in a training step the term on top; the arguments are those of the Trainer."""
        computed = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # An evaluation runs without gradients, even one that leaves the model in training mode.
        if not (self.orthogonality_weight and model.training and torch.is_grad_enabled()):
            return computed
        loss, outputs = computed if isinstance(computed, tuple) else (computed, None)
        term = orthogonality_loss(model)
        self._sum_since_log = self._sum_since_log + term.detach()
        self._terms_since_log += 1
        # Set by the training loop only; a call from outside of it is for one batch.
        batches = getattr(self, "current_gradient_accumulation_steps", 1)
        share = 1 if self._divides_the_loss(num_items_in_batch) else batches
        loss = loss + (self.orthogonality_weight / share) * term.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _divides_the_loss(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether `Trainer.training_step` is going to divide the loss by the number of accumulated batches."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return not said
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return not by_model and self.compute_loss_func is None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of the term in the logs of training steps."""
        if "loss" in logs and self._terms_since_log:
            logs["orthogonality"] = float(self._sum_since_log) / self._terms_since_log
            self._sum_since_log, self._terms_since_log = 0.0, 0
        super().log(logs, start_time)
