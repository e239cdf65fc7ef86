"""`transform`: adapt an eager model, a `GraphModule` or an exported program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import fx, nn

from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.export.captured import is_captured, transform_captured
from hra_fx.integrations.pretrained import root_class_for
from hra_fx.layers.accelerate_hooks import is_hooked
from hra_fx.layers.target import kind_of, weight_name
from hra_fx.model.detach import detach_all
from hra_fx.model.example_inputs import normalize_inputs
from hra_fx.model.inject import random_init
from hra_fx.model.setup import checked, set_up, valid_config
from hra_fx.model.state import adapted_layers, get_state
from hra_fx.model.verify import check_against_folded
from hra_fx.selection.check import check
from hra_fx.selection.select import select, with_head
from hra_fx.tracing.trace_model import trace_model

if TYPE_CHECKING:
    from torch.export import ExportedProgram

M = TypeVar("M", bound="nn.Module | ExportedProgram")


def transform(
    model: M,
    config: HRAConfig,
    adapter_name: str = "default",
    *,
    low_cpu_mem_usage: bool = False,
    trace: bool = False,
    example_inputs: Any = None,
    verify: bool = False,
) -> M:
    """Adapt a model in place: each selected weight acts as `W Q` from now on.

    Eager mode swaps the classes of layers; nothing is traced. Graph mode (`trace=True`, or a `GraphModule` or an
    exported program as `model`) rewrites a graph. Both use the same mathematics and passes.

    The model stays the object, and the class, that it was; its `state_dict` keeps every key and gains
    `<layer>.hra_u.<adapter>` of shape `(d, r)`, with `d = in_features` or `in_channels // groups * kh * kw` (and
    `<layer>.hra_u.<adapter>_anchor`, where `init_weights=True` takes one to start at the identity). Its own parameters
    are shared and frozen; what `config.bias` and `config.modules_to_save` train are copies, which stand in their place
    while the adapter is active (`<module>.hra_saved` holds what is not in place).

    Args:
        model: any module with layers that can be adapted (Linear, Conv1d to Conv3d, transformers' Conv1D, attention);
            a `GraphModule` gets the reflections in its own graph. Of a `torch.export.ExportedProgram` a new one is
            made, with one node `hra_fx::rotate` for each weight.
        config: which layers, how many reflections, and how they start; a `peft.HRAConfig` is converted.
        adapter_name: name of the adapter, a part of its parameters' names.
        low_cpu_mem_usage: make the vectors on the meta device, for `load_adapter`, `reset_adapters` or
            `load_state_dict(..., assign=True)` to fill. Otherwise they are on the device of their layer, which may be
            the meta device too.
        trace: trace the model, and return a `torch.fx.GraphModule` in which each reflection is a node of its own. It
            shares the modules and parameters of `model`, and replaces it. torch.fx traces without running the model;
            the graph is valid in train and eval mode, and its optional arguments keep their defaults. Where torch.fx
            refuses, give `example_inputs`.
        example_inputs: one tensor, a tuple of positional or a dictionary of keyword arguments: the call for `verify`,
            and the call that `torch.export` captures for `trace` where torch.fx cannot trace the model, or where the
            call gives optional arguments. That graph is for inputs of these shapes and the mode that the model is in,
            each rotated weight is a node, and its parameters share the memory of the model's. Only forward, `report`,
            `fold`, `freeze`, `lower` and `visualize` work on it. For anything else, such as `save_adapter`, load its
            `state_dict` (with `strict=False`) into a model that was transformed without `trace`. A model is refused if
            its graph would train differently: it has backward hooks, its forward adds one to a tensor, calls a custom
            autograd function or draws from the global generators of Python or NumPy. Draws from other generators of
            these, and hooks on autograd nodes, are not detected.
        verify: compare random reflections with folded weights on copies of the model, for `example_inputs`, in train
            and eval mode, with gradients, before the model is returned.

    Returns:
        `model`, or the `GraphModule` of `trace`. The same call on a model that has the adapter already changes nothing.

    Raises:
        ConfigError: `config` is not an `HRAConfig` of hra_fx or PEFT.
        SelectionError: the configuration does not fit the model.
        UnsupportedLayerError: a selected layer cannot be adapted.
        AdapterError: the model has another adapter (see `add_adapter`), or this one with another configuration; or
            `verify` without `example_inputs`; or the model cannot be traced.
        VerificationError: the rewritten model would not compute what the folded one does. After any error the model is
            unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = transform(model, HRAConfig(r=2, target_modules=["0", "2"]))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.hra_u.default', '2.hra_u.default']
    """
    if is_captured(model):
        if low_cpu_mem_usage or verify or (example_inputs is not None and not trace):
            raise AdapterError(
                "low_cpu_mem_usage, example_inputs, verify: a captured program has no use for them, and trace=True "
                "makes one where torch.fx cannot trace the call. Leave them out, or transform without trace=True."
            )
        captured: Any = model
        return transform_captured(captured, valid_config(config), adapter_name)  # type: ignore[no-any-return]
    module: Any = model
    config = with_head(module, checked(module, config, adapter_name))
    call = None if example_inputs is None else normalize_inputs(example_inputs)
    if verify and call is None:
        raise AdapterError("verify=True: there is nothing to run. Give example_inputs, the arguments of one call.")
    if trace and not isinstance(module, fx.GraphModule):
        traced: Any = _traced(module, config, example_inputs)
        example_inputs = None if is_captured(traced) else example_inputs
        options: Any = {"low_cpu_mem_usage": low_cpu_mem_usage, "example_inputs": example_inputs, "verify": verify}
        return transform(traced, config, adapter_name, **options)  # type: ignore[no-any-return]
    if not _is_done(module, config, adapter_name):
        fill = random_init(adapter_name, config, on_meta=low_cpu_mem_usage)
        root_class = root_class_for(module)
        set_up(module, config, adapter_name, fill, root_class=root_class, call=call if verify else None)
    elif verify and call:
        check_against_folded(module, call)
    return model


def _traced(model: nn.Module, config: HRAConfig, example_inputs: Any) -> fx.GraphModule:
    if get_state(model) or adapted_layers(model):
        raise AdapterError(
            f"trace=True: {type(model).__name__} has adapters already. Trace it when the first one is added, or call "
            "hra_fx.graphs(model) for a graph to look at."
        )
    if hooked := next((path or "the model" for path, part in model.named_modules() if is_hooked(part)), None):
        raise AdapterError(
            f"trace=True: accelerate put a hook on {hooked}, which a graph would not run. Leave out trace=True, or "
            "call accelerate.hooks.remove_hook_from_submodules(model) first."
        )
    layers = select(model, config)
    check(model, layers, config)
    if stacked := next((path for path, layer in layers.items() if kind_of(layer) == "experts"), None):
        raise AdapterError(
            f"trace=True: {stacked} stands for a parameter of experts, whose reflections a graph cannot have. Leave "
            "out trace=True, or target_parameters."
        )
    traced = trace_model(model, list(layers.values()), example_inputs)
    if is_captured(traced):
        _refuse_tied(layers)
    return traced


def _refuse_tied(layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers that share a weight: in a graph of operators, they would be one layer with one adapter."""
    first: dict[int, str] = {}
    for path, layer in layers.items():
        weight = layer._parameters[weight_name(kind_of(layer))]
        if (other := first.setdefault(id(weight), path)) != path:
            raise AdapterError(
                f"trace=True: {other} and {path} share a weight, and a graph of torch.export does not tell them apart. "
                f"Exclude one of them with exclude_modules=[{path!r}], or leave out trace=True."
            )


def _is_done(model: nn.Module, config: HRAConfig, adapter_name: str) -> bool:
    record = get_state(model)
    carried = adapted_layers(model)
    if record and not carried:  # its parts were folded one by one
        detach_all(model)
        record = None
    present = record.configs if record else {}
    if present.get(adapter_name) == config:
        if odd := sorted(select(model, config).keys() ^ _layers_with(model, adapter_name)):
            raise AdapterError(
                f"adapter {adapter_name!r}: the model was transformed and changed since, so that {odd[0]} is not in "
                "step with its configuration. Fold it (hra_fx.fold) and transform it again."
            )
        return True
    if adapter_name in present:
        raise AdapterError(
            f"adapter {adapter_name!r}: the model has it already, with another configuration. Fold it first, or choose "
            "another name."
        )
    if carried:
        names = ", ".join(dict.fromkeys(name for layer in carried.values() for name in layer.hra_u))
        raise AdapterError(
            f"adapter {adapter_name!r}: {next(iter(carried))} carries reflections already, of {names}. For another one "
            "beside it call hra_fx.add_adapter on the model that was transformed; to build on it fold it first."
        )
    return False


def _layers_with(model: nn.Module, adapter_name: str) -> set[str]:
    return {path for path, layer in adapted_layers(model).items() if adapter_name in layer.hra_u}
