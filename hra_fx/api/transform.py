"""`transform`, for eager models and `GraphModule`s."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import fx, nn

from hra_fx.api.pretrained import root_class_for
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.layers.accelerate_hooks import is_hooked
from hra_fx.layers.weight import mark_readers
from hra_fx.model.inject import random_init
from hra_fx.model.setup import put_adapter, valid_config
from hra_fx.model.state import adapted_layers, check_is_module, get_state
from hra_fx.model.whole import refuse_program
from hra_fx.passes import adapt
from hra_fx.selection.select import with_head

M = TypeVar("M", bound=nn.Module)


def transform(
    model: M,
    config: HRAConfig,
    adapter_name: str = "default",
    *,
    low_cpu_mem_usage: bool = False,
    trace: bool = False,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
) -> M:
    """Adapt a model in place, so that each selected layer uses `W Q` instead of its weight `W`.

    Eager mode changes the classes of layers and does not trace anything. Graph mode (`trace=True`, or a
    `GraphModule` as `model`) rewrites a graph. Both compute the same outputs.

    The model remains the same object and an instance of its class. Its `state_dict` keeps all keys and gets the new
    keys `<layer>.hra_u.<adapter>` of shape `(d, r / 2, 2)`, or `(d, r)` if it trains vectors (`HRAConfig.pairs`), with
    `d = in_features` or `in_channels // groups * kh * kw`. The base model's parameters are frozen, and all adapters
    share them. Biases and modules that `config.bias` and
    `config.modules_to_save` train are copies, which replace the originals while the adapter is active. The tensors that
    are not in use are in `<module>.hra_saved`.

    Args:
        model: any module with layers that can be adapted (Linear, Conv1d to Conv3d, transformers' Conv1D, attention,
            experts). The graph of a `GraphModule` is rewritten in place.
        config: the layers to adapt, their rank and initialization. A `peft.HRAConfig` is converted.
        adapter_name: name of the adapter, used in the names of its parameters.
        low_cpu_mem_usage: create the vectors on the meta device, to be filled by `load_adapter`, `reset_adapters` or
            `load_state_dict(..., assign=True)`. Otherwise they are on the device of their layer, which may also be the
            meta device.
        trace: return a `torch.fx.GraphModule` in which each reflection is a separate node, to be used instead of
            `model`, whose modules and parameters it shares. torch.fx traces the model, with optional arguments at their
            defaults; if it cannot, `torch.export` captures one call, and the graph is valid for the arguments of this
            call and the dtype of the model. The graph works in train and eval mode. Outputs that `torch.export` does
            not support, such as caches, are `None`. The guide to graph mode has the limits of a capture.
        example_inputs: one tensor, a tuple of positional arguments or a dictionary of keyword arguments: the call that
            `trace` captures if torch.fx cannot trace the model, or if it passes optional arguments. By default, it is
            created from the configuration of a transformers model, without labels.
        dynamic_shapes: the sizes of the captured call that may change, as in `torch.export.export`. By default, all
            sizes that the model allows may change; for images, only the batch size. A call with other sizes raises an
            error. Requires `trace`.

    Returns:
        `model`, or the `GraphModule` created by `trace`. Repeating the call on the transformed model has no effect.

    Raises:
        ConfigError: `config` is not an `HRAConfig` of hra_fx or PEFT.
        SelectionError: the configuration does not fit the model.
        UnsupportedLayerError: a selected layer cannot be adapted.
        AdapterError: the model has another adapter (see `add_adapter`), or this one with another configuration; or
            `dynamic_shapes` is set without `trace`; or the model cannot be traced, or is an `ExportedProgram`. After
            any error the model is unchanged.

    Warns:
        HRAWarning: with an odd rank or Gram-Schmidt, the model does not start as the base model, because `Q` cannot be
            the identity, and it trains vectors, which learn less than pairs.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = transform(model, HRAConfig(r=2, target_modules=["0", "2"]))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.hra_u.default', '2.hra_u.default']
    """
    refuse_program(model)
    module: Any = model
    check_is_module(module)
    config = with_head(module, valid_config(config))
    if dynamic_shapes is not None and (not trace or isinstance(module, fx.GraphModule)):
        raise AdapterError("`dynamic_shapes` needs trace=True and a model that is not a GraphModule.")

    def attach(root: nn.Module) -> None:
        fill = random_init(adapter_name, config, on_meta=low_cpu_mem_usage)
        put_adapter(root, adapter_name, config, fill, root_class=root_class_for(root))

    if trace and not isinstance(module, fx.GraphModule):
        _check_traceable(module)
        graph = adapt(module, config, attach, example_inputs, dynamic_shapes)
        mark_readers({"": module}, adapted_layers(graph))  # code of the model is called too, such as `generate`
        return graph  # type: ignore[return-value]
    if not _is_done(module, config, adapter_name):
        attach(module)
    return model


def _check_traceable(model: nn.Module) -> None:
    if get_state(model) or adapted_layers(model):
        raise AdapterError(
            f"trace=True: {type(model).__name__} already has adapters. Use trace=True when you add the first one, or "
            "call hra_fx.graphs(model) to inspect its graph."
        )
    if hooked := next((path or "the model" for path, part in model.named_modules() if is_hooked(part)), None):
        raise AdapterError(
            f"trace=True: {hooked} has a hook of accelerate, which a graph would not run. Leave out trace=True, or "
            "call accelerate.hooks.remove_hook_from_submodules(model) first."
        )


def _is_done(model: nn.Module, config: HRAConfig, adapter_name: str) -> bool:
    """Whether the model already has this adapter. Raises an error if it has another one."""
    state = get_state(model)
    if state and state.configs.get(adapter_name) == config:
        return True
    for path, layer in adapted_layers(model).items():
        raise AdapterError(
            f"adapter {adapter_name!r}: {path} already has reflections of {', '.join(layer.hra_u)}, of another name or "
            "configuration. For another configuration, first call hra_fx.delete_adapter(model, "
            f"{next(iter(layer.hra_u))!r}). To add another adapter, call hra_fx.add_adapter."
        )
    return False
