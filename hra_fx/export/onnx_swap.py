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
from torch import nn

from hra_fx.errors import AdapterError
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.target import REFLECTION
from hra_fx.layers.trained_copies import all_copies
from hra_fx.model.state import adapted_layers, name_in, root_of

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
        hra_fx.errors.AdapterError: 0: adapter 'default' is not plain vectors at scale 1 (it has pairs, Gram-Schmidt...
    """
    name, reflections = _adapter(model)
    for path, reflection in reflections.items():
        if reflection.form(name) or name in reflection.scales:
            raise AdapterError(
                f"{path}: adapter {name!r} is not plain vectors at scale 1 (it has pairs, Gram-Schmidt, a scale, or "
                "directions of protect), which all other adapters of the graph would have too. Export an empty one: "
                "hra_fx.add_adapter(model, 'slot', HRAConfig(r=..., pairs=False)); hra_fx.set_adapter(model, 'slot')."
            )
    graph = onnx_program.model.graph
    for path in reflections:
        if (entry := f"{path}.{REFLECTION}.{name}") not in graph.initializers:
            raise AdapterError(
                f"{path}: the graph does not use the vectors {REFLECTION}.{name}. Export this model with "
                "torch.onnx.export(..., dynamo=True, optimize=False); the optimizer replaces them with constants."
            )
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
        AdapterError: the graph does not have inputs for all layers or vectors of the adapter, or the adapter has
            trained copies of other parameters.

    Example:
        >>> import hra_fx
        >>> from types import SimpleNamespace
        >>> model = hra_fx.transform(nn.Sequential(nn.Linear(3, 2)), hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> adapter_inputs(model, [SimpleNamespace(name="0.hra_u", shape=[3, 4])])["0.hra_u"].shape
        (3, 4)
    """
    name, reflections = _adapter(model, adapter_name)
    ending = f".{REFLECTION}"
    shapes = {slot.name.removesuffix(ending): slot.shape for slot in inputs if slot.name.endswith(ending)}
    chains = {path: reflection.chain(name).detach().cpu() for path, reflection in reflections.items()}
    for path, chain in chains.items():
        *sizes, rank = shapes.get(path, (0, 0))
        if list(chain.shape[:-1]) != list(sizes) or chain.shape[-1] > rank:
            width = sizes[-1]
            raise AdapterError(
                f"{path}: adapter {name!r} has {chain.shape[-1]} reflections of width {chain.shape[-2]} here, and the "
                f"graph supports at most {rank} of width {width}. Export it with an adapter of this rank on all layers."
            )
    dtype = next(iter(chains.values())).dtype
    padded = {path: torch.zeros(*shape, dtype=dtype) for path, shape in shapes.items()}
    for path, chain in chains.items():
        padded[path][..., : chain.shape[-1]] = chain
    return {path + ending: vectors.numpy() for path, vectors in padded.items()}


def _adapter(model: nn.Module, adapter_name: str | None = None) -> tuple[str, dict[str, HouseholderAdapters]]:
    """The name of an adapter, by default the active one, and the reflections of its layers."""
    root, record = root_of(model)
    active = () if record.disabled or record.merged else record.active
    if adapter_name is None and len(active) != 1:
        raise AdapterError(
            f"a graph needs exactly one active adapter, which is not merged or disabled, got {list(active)}. Call "
            "hra_fx.set_adapter(model, name)."
        )
    name = name_in(record, active[0] if adapter_name is None else adapter_name)
    for path, (_, copies) in all_copies(root).items():
        if name in copies.copied:
            raise AdapterError(
                f"{path or 'the model'}: adapter {name!r} trains a copy of it (modules_to_save or bias), which cannot "
                "be an input of a graph. Export this adapter alone, without make_swappable."
            )
    return name, {path: layer.hra_u for path, layer in adapted_layers(root).items() if name in layer.hra_u}
