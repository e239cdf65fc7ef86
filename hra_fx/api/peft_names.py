"""PEFT's names `get_peft_model` and `PeftModel`, with the arguments of PEFT 0.21; and `from_peft`."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from hra_fx.api.peft_model import HRAModel, as_hra_model, check_names
from hra_fx.api.peft_wrapper import hand_over
from hra_fx.config import HRAConfig
from hra_fx.functional.chain import to_pairs
from hra_fx.integrations.pretrained import root_class_for
from hra_fx.model.inject import all_or_nothing
from hra_fx.model.peft_view import take_over
from hra_fx.model.state import adapted_layers, root_of

#: PEFT's name for the class whose `from_pretrained` loads an adapter into a base model.
PeftModel = HRAModel


def get_peft_model(
    model: nn.Module,
    peft_config: HRAConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Adapt a model and add PEFT's methods, like `HRAModel`, with the arguments of `peft.get_peft_model`.

    Args:
        model: any module that `hra_fx.transform` accepts, changed in place.
        peft_config: an `hra_fx.HRAConfig` or a `peft.HRAConfig`.
        adapter_name: name of the adapter.
        mixed, autocast_adapter_dtype: ignored, because all adapters are HRA and vectors are always at least float32.
        revision: revision of the base model, written into the configuration.
        low_cpu_mem_usage: create the vectors on the meta device, to be loaded later.

    Returns:
        `model`, with PEFT's methods.

    Raises:
        HRAError: see `HRAModel`.

    Example:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 12 || all params: 40 || trainable%: 30.0000
    """
    adapted = HRAModel(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    if revision is not None:
        adapted.peft_config[adapter_name].revision = revision
    return adapted


def from_peft(model: nn.Module) -> Any:
    """Convert a model with PEFT's HRA layers to hra_fx in place, with the same adapters.

    PEFT's layers are replaced by those of hra_fx. All adapters keep their vectors, trained modules and biases, and
    their state: which are active (and in which order), which are trainable, and whether they are disabled. Vectors and
    trained modules remain the same parameters. From now on, the parameters of even ranks contain pairs of vectors
    (`HRAConfig.pairs`). Call this before the first step of an optimizer, because its state of vectors does not fit
    pairs. Biases become copies: with `bias`, create the optimizer after this call.

    `report`, `fold`, `save_as_lora`, `save_adapter` and `visualize` also take a model of PEFT as it is.

    Args:
        model: a `peft.PeftModel`, a module that contains one, or a model that PEFT has added layers to (`add_adapter`
            of transformers). The methods of the `PeftModel` are afterwards those of the base model, so a Trainer that
            holds it saves and resumes the adapters.

    Returns:
        The base model, as an `HRAModel`.

    Raises:
        AdapterError: the model has no HRA layers of PEFT, has layers of other PEFT methods, or has merged adapters.
        HRAError: for other errors, see `hra_fx.transform`. After any error the model is unchanged.

    Example:
        >>> import peft, torch
        >>> wrapped = peft.get_peft_model(
        ...     nn.Sequential(nn.Linear(6, 4)), peft.HRAConfig(r=2, target_modules=["0"], init_weights=False)
        ... )
        >>> x = torch.ones(3, 6)
        >>> wanted = wrapped(x)
        >>> bool(torch.allclose(from_peft(wrapped)(x), wanted, atol=1e-6))
        True
    """
    with all_or_nothing() as undo:
        root = take_over(model, undo, root_class_for)
        check_names(root)
        hand_over(model, root, undo)
    _train_pairs(root)
    return as_hra_model(root)


def _train_pairs(root: nn.Module) -> None:
    """Convert the vectors in the same parameters to pairs, where this is possible."""
    configs = root_of(root)[1].configs
    for path, layer in adapted_layers(root).items():
        for name, spec in layer.hra_u.specs.items():
            if configs[name].trains_pairs(path):
                own = layer.hra_u[name]
                own.grad, own.data = None, to_pairs(own.detach()).to(own.dtype)
                layer.hra_u.specs[name] = dataclasses.replace(spec, pairs=True)
