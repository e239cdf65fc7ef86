"""Training with transformers.

Nothing else in the package imports this, because `transformers.Trainer` needs accelerate, which is not a dependency of
hra_fx.
"""

from hra_fx.integrations.rotation import RotationCallback as RotationCallback
from hra_fx.integrations.trainer import HRATrainer as HRATrainer
