"""One ONNX graph for many adapters: the vectors are inputs with the exported adapter as default values.

    onnx_program = torch.onnx.export(model, args, dynamo=True, optimize=False)
    hra_fx.make_swappable(onnx_program, model).save("model.onnx")
    session = onnxruntime.InferenceSession("model.onnx")
    factors = hra_fx.adapter_inputs(model, session.get_overridable_initializers(), "another")
    session.run(None, {"input_ids": ids, **factors})

A vector of zeros gives the identity, so a graph can run every adapter with the same or a lower rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hra_fx.errors import AdapterError
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.target import REFLECTION
from hra_fx.layers.trained_copies import all_copies
from hra_fx.model.state import adapted_layers, names_in, root_of

if TYPE_CHECKING:
    import numpy
    from torch.onnx import ONNXProgram


def make_swappable(onnx_program: ONNXProgram, model: nn.Module) -> ONNXProgram:
    """Turn the vectors of the active adapter into inputs `<layer>.hra_u` of an ONNX graph, with default values.

    The default values are the vectors of the exported adapter. Then the graph is optimized, as `torch.onnx.export` does
    by default, except for the vectors.

    Args:
        onnx_program: the result of `torch.onnx.export(model, ..., dynamo=True, optimize=False)`; modified in place.
        model: the transformed model that was exported. It must have one active adapter with plain vectors
            (`pairs=False`): without trained copies and Gram-Schmidt, at scale 1, and without directions that
            `hra_fx.protect` keeps.

    Returns:
        `onnx_program`.

    Raises:
        AdapterError: the model has no such adapter, or the graph does not use its vectors.

    Example:
        >>> import hra_fx
        >>> model = hra_fx.transform(nn.Sequential(nn.Linear(3, 2)), hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> make_swappable(torch.export.export(model, (torch.ones(1, 3),)), model)
        Traceback (most recent call last):
        ...
        hra_fx.errors.AdapterError: make_swappable: expected a torch.onnx.ONNXProgram, got ExportedProgram. Pass the ...
    """
    if type(onnx_program).__name__ != "ONNXProgram":
        raise AdapterError(
            f"make_swappable: expected a torch.onnx.ONNXProgram, got {type(onnx_program).__name__}. Pass the result of "
            "torch.onnx.export(model, args, dynamo=True, optimize=False)."
        )
    name, reflections = _adapter(model)
    for path, reflection in reflections.items():
        unsupported = {
            "Gram-Schmidt": reflection.specs[name].apply_GS,
            "pairs of vectors": reflection.specs[name].pairs,
            "directions that it keeps": reflection.kept(name) is not None,
            "a scale other than 1": name in reflection.scales,
        }
        for reason in (reason for reason, holds in unsupported.items() if holds):
            raise AdapterError(
                f"{path}: adapter {name!r} has {reason} here, which would be part of the graph for all other adapters. "
                "Export with an adapter of plain vectors. Its rank is the largest that the graph can run: "
                "hra_fx.add_adapter(model, 'slot', HRAConfig(r=<even>, pairs=False, ...)); "
                "hra_fx.set_adapter(model, 'slot')."
            )
    graph = onnx_program.model.graph
    names = {path: f"{path}.{REFLECTION}.{name}" for path in reflections}
    for path, entry in names.items():
        if entry not in graph.initializers:
            raise AdapterError(
                f"{path}: the graph does not use the vectors {REFLECTION}.{name}. Export this model with "
                "torch.onnx.export(..., dynamo=True, optimize=False); the optimizer replaces them with constants."
            )
    for path, entry in names.items():
        value = graph.initializers[entry]
        value.name = f"{path}.{REFLECTION}"
        graph.inputs.append(value)
    onnx_program.optimize()
    return onnx_program


def adapter_inputs(
    model: nn.Module, inputs: Iterable[Any], adapter_name: str | None = None
) -> dict[str, numpy.ndarray[Any, Any]]:
    """Create the inputs that make a graph from `make_swappable` run an adapter of the model, active or not.

    Gram-Schmidt and scales are converted to plain vectors, which are padded with zeros to the rank of the
    graph. Layers without this adapter get zeros.

    Args:
        model: a transformed model with the same layers as the exported model.
        inputs: `InferenceSession.get_overridable_initializers()`, or objects with `name` and `shape`;
            inputs other than `<layer>.hra_u` are ignored.
        adapter_name: the adapter; `None` for the active one.

    Returns:
        Name of an input -> array, in the dtype of the vectors. numpy does not support bfloat16.

    Raises:
        AdapterError: the adapter has a higher rank than the graph, layers without an input, or trained copies of other
            parameters.

    Example:
        >>> import hra_fx
        >>> from types import SimpleNamespace
        >>> model = hra_fx.transform(nn.Sequential(nn.Linear(3, 2)), hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> adapter_inputs(model, [SimpleNamespace(name="0.hra_u", shape=[3, 4])])["0.hra_u"].shape
        (3, 4)
    """
    name, layers = _adapter(model, adapter_name)
    slots = {slot.name.rpartition(".")[0]: slot for slot in inputs if slot.name.rpartition(".")[2] == REFLECTION}
    for path in layers:
        if path not in slots:
            available = ", ".join(list(slots)[:4]) or "none"
            raise AdapterError(
                f"{path}: adapter {name!r} adapts this layer, but the graph has no input {path}.{REFLECTION}. The "
                f"layers with an input: {available}. Export the graph with an adapter on all these layers."
            )
    dtype = next((reflection[name].dtype for reflection in layers.values()), torch.float32)
    return {slot.name: _vectors(slot, layers.get(path), name, dtype).numpy() for path, slot in slots.items()}


def _adapter(model: nn.Module, adapter_name: str | None = None) -> tuple[str, dict[str, HouseholderAdapters]]:
    """The name of an adapter, by default the active one, and the reflections of its layers."""
    root, record = root_of(model)
    active = () if record.disabled or record.merged else record.active
    if adapter_name is None and len(active) != 1:
        raise AdapterError(
            f"a graph needs exactly one active adapter, which is not merged or disabled, got {list(active)}. Call "
            "hra_fx.set_adapter(model, name)."
        )
    name = names_in(record, active if adapter_name is None else adapter_name)[0]
    for path, (_, copies) in all_copies(root).items():
        if name in copies.copied:
            raise AdapterError(
                f"{path or 'the model'}: adapter {name!r} has a trained copy of it (modules_to_save or bias), "
                "which cannot be an input of a graph. Export a separate graph for this adapter, with "
                "torch.onnx.export alone."
            )
    return name, {path: layer.hra_u for path, layer in adapted_layers(model).items() if name in layer.hra_u}


def _vectors(slot: Any, reflection: HouseholderAdapters | None, name: str, dtype: torch.dtype) -> Tensor:
    """Pad the vectors of a layer with zeros to the shape of the input."""
    width, rank = (int(size) for size in slot.shape)
    if reflection is None:
        return torch.zeros(width, rank, dtype=dtype)
    chain = reflection.chain(name).detach().cpu()
    if chain.shape[0] != width or chain.shape[1] > rank:
        raise AdapterError(
            f"{slot.name}: adapter {name!r} has {chain.shape[1]} reflections of width {chain.shape[0]} here, "
            f"but the graph supports at most {rank} of width {width}. Export it with an adapter of higher rank."
        )
    return nn.functional.pad(chain.to(dtype), (0, rank - chain.shape[1])).contiguous()
