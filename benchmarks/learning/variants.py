"""Methods that change another one, at its learning rate: settings of pairs, on validation data only, and `keeping`."""

from __future__ import annotations

from dataclasses import replace

from learning.keeping import CONTROLS, KEEPING
from learning.methods import METHODS

#: The method that is varied, and the task.
VARIED, VARIED_TASK = "hra-pairs", "language"
VARIANTS = {
    "hra-pairs-decay": replace(METHODS[VARIED], label="weight decay 0.1", weight_decay=0.1),
    "hra-pairs-cosine": replace(METHODS[VARIED], label="cosine schedule", schedule="cosine"),
    "hra-pairs-constant": replace(METHODS[VARIED], label="constant rate", schedule="constant_with_warmup"),
    "hra-pairs-no-warmup": replace(METHODS[VARIED], label="no warmup", warmup=0.0),
}
CHANGED = KEEPING | CONTROLS
#: Method -> the one whose learning rates it has.
BASE_OF = {**dict.fromkeys(VARIANTS, VARIED), **{name: base for name, (base, _) in CHANGED.items()}}
ALL = METHODS | VARIANTS | {name: method for name, (_, method) in CHANGED.items()}
