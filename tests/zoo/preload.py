"""What the process imports from which all models' processes are forked."""

import contextlib
import warnings

with warnings.catch_warnings(), contextlib.suppress(ImportError):
    warnings.simplefilter("ignore")
    import diffusers
    import timm
    import torch.export
    import torchvision
    import transformers
    import zoo.checks

    import hra_fx.api.transform

__all__ = ["diffusers", "hra_fx", "timm", "torch", "torchvision", "transformers", "zoo"]
