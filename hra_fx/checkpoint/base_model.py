"""The entries about the base model in an adapter's configuration, as PEFT writes them."""

from __future__ import annotations

from typing import Any

from torch import nn

from hra_fx.config import HRAConfig
from hra_fx.layers.class_swap import original_class


def base_model_name(root: nn.Module, config: HRAConfig) -> str | None:
    """PEFT's `base_model_name_or_path`: as configured, or as transformers knows it."""
    base = config.base_model_name_or_path or getattr(root, "name_or_path", None)
    return base if isinstance(base, str) and base else None


def auto_mapping(root: nn.Module, config: HRAConfig) -> dict[str, Any] | None:
    """PEFT's `auto_mapping`: the class of the base model, if it does not follow from a task type."""
    kind = original_class(root)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return config.auto_mapping or (None if config.task_type else mapping)
