"""`get_peft_model`, with the arguments of PEFT's function."""

from __future__ import annotations

from typing import Any

from torch import nn

from hra_fx.api.peft_model import HRAModel
from hra_fx.config import HRAConfig


def get_peft_model(
    model: nn.Module,
    peft_config: HRAConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Adapt a model in place and give it PEFT's methods, with the arguments of `peft.get_peft_model`.

    Args:
        model: any module that `hra_fx.transform` accepts, changed in place.
        peft_config: an `hra_fx.HRAConfig` or a `peft.HRAConfig`.
        adapter_name: name of the adapter.
        mixed, autocast_adapter_dtype: ignored, because all adapters are HRA and vectors are always at least float32.
        revision: revision of the base model, written into the configuration.
        low_cpu_mem_usage: create the vectors on the meta device, to be loaded later.

    Returns:
        `model`, which is an `HRAModel` now.

    Raises:
        AdapterError: `model` is a graph, or has an attribute with the name of one of PEFT's methods.
        HRAError: for other errors, see `hra_fx.transform`. After any error the model is unchanged.

    Example:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 12 || all params: 40 || trainable%: 30.0000
    """
    adapted: Any = HRAModel(model, peft_config, adapter_name, low_cpu_mem_usage)
    if revision is not None:
        adapted.peft_config[adapter_name].revision = revision
    return adapted
