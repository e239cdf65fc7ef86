"""Training with transformers.

Not imported by the rest of the package, since `transformers.Trainer` needs accelerate, which is no dependency of
hra_fx.
"""

from hra_fx.integrations.rotation import RotationCallback as RotationCallback
from hra_fx.integrations.trainer import HRATrainer as HRATrainer
