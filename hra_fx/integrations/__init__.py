"""Training with `transformers.Trainer`.

The rest of the package does not import this module, because the Trainer needs accelerate, which is not a dependency of
hra_fx.
"""

from hra_fx.integrations.rotation import RotationCallback as RotationCallback
from hra_fx.integrations.trainer import HRATrainer as HRATrainer
