"""Training in pairs for programs that make the Trainer and its optimizer themselves, and take callbacks."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hra_fx.model.pairs import check_difference, train_pairs_if_possible


class PairCallback(TrainerCallback):
    """Calls `hra_fx.train_pairs` when the Trainer of transformers, TRL and others begins to train.

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
        """Check the number."""
        check_difference(difference)
        self.difference = difference

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the optimizer train pairs. Its state is loaded by then."""
        train_pairs_if_possible(kwargs["optimizer"], kwargs["model"], self.difference)
