"""`get_layer_status`, `get_model_status`: the state of every adapted layer, in the dataclasses of PEFT.

Source of the fields and their meaning: PEFT 0.21, `peft.peft_model`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from hra_fx.layers.class_swap import original_class
from hra_fx.layers.quantized import quant_scheme_of
from hra_fx.layers.trained_copies import all_copies
from hra_fx.model.state import AdapterState, adapted_layers, root_of
from hra_fx.model.trainable import count_parameters
from hra_fx.selection.select import saved_modules

Irregular: TypeAlias = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """The state of one adapted layer, or of one module that an adapter trains in full.

    Attributes:
        name: path of the module.
        module_type: `"hra.HRALinear"` and others, or `"ModulesToSaveWrapper"`, as in PEFT.
        enabled: whether adapters are enabled.
        active_adapters: names of the active adapters, in the order in which they are applied.
        merged_adapters: names of the merged adapters.
        requires_grad: adapter name -> whether its parameters here are trainable; `"irregular"` if only some are.
        available_adapters: names of the adapters with parameters here.
        devices: adapter name -> device types of its parameters.
        quantization_backend: quantization of the base weight, or `None`.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The state of a model with adapters. A field is `"irregular"` if the layers of the model differ.

    Attributes:
        base_model_type: class of the base model.
        adapter_model_type: always `"HRAModel"`.
        peft_types: adapter name -> `"HRA"`.
        trainable_params: number of trainable parameters.
        total_params: number of all parameters.
        num_adapter_layers: number of modules in `get_layer_status`.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices, quantization_backend: as
            in `TunerLayerStatus`, for all layers together.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the state of every adapted layer and of every module with a trained copy, like `peft.get_layer_status`.

    Raises:
        AdapterError: the model has no adapters.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> status = get_layer_status(model)[0]
        >>> status.name, status.module_type, status.active_adapters, status.requires_grad
        ('0', 'hra.HRALinear', ['default'], {'default': True})
    """
    root, state = root_of(model)
    found = []
    for path, layer in adapted_layers(root).items():
        scheme = quant_scheme_of(layer)
        vectors: dict[str, list[Tensor]] = {name: [layer.hra_u[name]] for name in layer.hra_u}
        status = _status(path, f"hra.HRA{original_class(layer).__name__}", vectors, state)
        status.merged_adapters = [name for name in state.merged if name in vectors]
        status.quantization_backend = scheme.description(layer) if scheme else None
        found.append(status)
    saved: dict[str, dict[str, list[Tensor]]] = {}
    for name, config in state.configs.items():
        for path, module in saved_modules(root, config).items():
            trained = [t for owner, copies in all_copies(module).values() for t in copies.tensors(owner, name).values()]
            saved.setdefault(path, {})[name] = [t for t in trained if isinstance(t, nn.Parameter)]
    found += [_status(path, "ModulesToSaveWrapper", held, state) for path, held in saved.items()]
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the state of a model with adapters, like `peft.get_model_status`.

    Raises:
        AdapterError: the model has no adapters.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> status = get_model_status(model)
        >>> status.base_model_type, status.trainable_params, status.enabled
        ('Sequential', 12, True)
    """
    root, state = root_of(model)
    layers = get_layer_status(root)
    trained, total = count_parameters(root)
    backends = {layer.quantization_backend for layer in layers}
    return TunerModelStatus(
        base_model_type=original_class(root).__name__,
        adapter_model_type="HRAModel",
        peft_types=dict.fromkeys(state.configs, "HRA"),
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=not state.disabled,
        active_adapters=list(state.active),
        merged_adapters=sorted(state.merged),
        requires_grad={
            name: _common([layer.requires_grad[name] for layer in layers if name in layer.requires_grad])
            for name in state.configs
        },
        available_adapters=sorted(state.configs),
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, ())})
            for name in state.configs
        },
        quantization_backend=backends.pop() if len(backends) == 1 else "irregular",
    )


def _status(path: str, kind: str, tensors: dict[str, list[Tensor]], state: AdapterState) -> TunerLayerStatus:
    return TunerLayerStatus(
        name=path,
        module_type=kind,
        enabled=not state.disabled,
        active_adapters=list(state.active),
        merged_adapters=[],
        requires_grad={name: _common([t.requires_grad for t in held]) for name, held in tensors.items()},
        available_adapters=sorted(tensors),
        devices={name: sorted({t.device.type for t in held}) for name, held in tensors.items()},
        quantization_backend=None,
    )


def _common(values: Iterable[bool | Irregular]) -> bool | Irregular:
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"
