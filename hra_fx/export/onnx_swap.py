"""One ONNX graph for many adapters: the vectors are inputs, whose default is the adapter that was exported.

onnx_program = torch.onnx.export(model, args, dynamo=True, optimize=False)
hra_fx.make_swappable(onnx_program, model).save("model.onnx")
session = onnxruntime.InferenceSession("model.onnx")
factors = hra_fx.adapter_inputs(model, session.get_overridable_initializers(), "another")
session.run(None, {"input_ids": ids, **factors})

A reflection by a vector of zeros is the identity, so a graph takes every adapter of its rank or less.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from hra_fx.errors import AdapterError
from hra_fx.layers.adapters import Reflection
from hra_fx.layers.target import REFLECTION
from hra_fx.layers.trained_copies import copies_of
from hra_fx.model.state import Record, names_in, root_of, sites_of

if TYPE_CHECKING:
    import numpy
    from torch.onnx import ONNXProgram


_ROOM = (
    "Export with an adapter of plain vectors, whose rank is what the graph has room for: "
    "hra_fx.add_adapter(model, 'room', HRAConfig(r=<even>, ...)); hra_fx.set_adapter(model, 'room')."
)
#: What onnxruntime calls a dtype of an input.
_DTYPES = {"float": torch.float32, "float16": torch.float16, "double": torch.float64, "bfloat16": torch.bfloat16}


class Input(Protocol):
    """An input of a graph, as `InferenceSession.get_overridable_initializers()` gives them; these have a `type` too."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def shape(self) -> Any:
        """Its shape."""


def make_swappable(onnx_program: ONNXProgram, model: nn.Module) -> ONNXProgram:
    """Make the vectors of the active adapter inputs of a graph, `<layer>.hra_u`, with their values as the default.

    The graph is optimized afterwards, as `torch.onnx.export` does by itself, without the vectors.

    Args:
        onnx_program: `torch.onnx.export(model, ..., dynamo=True, optimize=False)`; it is changed.
        model: the transformed model that was exported. One adapter acts, made of plain vectors: without trained copies,
            Gram-Schmidt and, since an anchor is not for others, of even rank (or started with `init_weights=False`).

    Returns:
        `onnx_program`.

    Raises:
        AdapterError: the model has no such adapter, or the graph does not read its vectors.

    Example:
        >>> import hra_fx
        >>> model = hra_fx.transform(nn.Sequential(nn.Linear(3, 2)), hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> make_swappable(torch.export.export(model, (torch.ones(1, 3),)), model)
        Traceback (most recent call last):
        ...
        hra_fx.errors.AdapterError: make_swappable: ExportedProgram is no torch.onnx.ONNXProgram. Give what ...
    """
    if type(onnx_program).__name__ != "ONNXProgram":
        raise AdapterError(
            f"make_swappable: {type(onnx_program).__name__} is no torch.onnx.ONNXProgram. Give what "
            "torch.onnx.export(model, args, dynamo=True, optimize=False) gave."
        )
    name, reflections = _exported(model)
    graph = onnx_program.model.graph
    values = {path: graph.initializers.get(f"{path}.{REFLECTION}.{name}") for path in reflections}
    for path, value in values.items():
        if value is None:
            raise AdapterError(
                f"{path}: the graph does not read its vectors {REFLECTION}.{name}. Export the very model with "
                "torch.onnx.export(..., dynamo=True, optimize=False); the optimizer computes constants of them."
            )
    for path, value in values.items():
        assert value is not None
        value.name = f"{path}.{REFLECTION}"
        graph.inputs.append(value)
    onnx_program.optimize()
    return onnx_program


def adapter_inputs(
    model: nn.Module, inputs: Iterable[Input], adapter_name: str | None = None
) -> dict[str, numpy.ndarray[Any, Any]]:
    """What a graph of `make_swappable` takes to run another adapter: any that the model has, active or not.

    Gram-Schmidt, anchors and strengths are seen to: a graph gets plain vectors, padded to its rank with zeros, and
    zeros for a layer that the adapter leaves alone.

    Args:
        model: a transformed model with the layers of the one that was exported.
        inputs: those of the graph, as `InferenceSession.get_overridable_initializers()` gives them; others than
            `<layer>.hra_u` are left alone.
        adapter_name: the adapter; `None` for the active one.

    Returns:
        name of an input -> its array, in the dtype of that input where `inputs` tells it (`type`), else in that of the
        adapter's vectors.

    Raises:
        AdapterError: the adapter has more reflections than the graph has room for, layers that the graph has no inputs
            for, or trained copies of other parameters; or the graph is in a dtype that numpy does not have.

    Example:
        >>> import hra_fx
        >>> from types import SimpleNamespace
        >>> model = hra_fx.transform(nn.Sequential(nn.Linear(3, 2)), hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> adapter_inputs(model, [SimpleNamespace(name="0.hra_u", shape=[3, 4])])["0.hra_u"].shape
        (3, 4)
    """
    root, record = root_of(model)
    name = _one(record) if adapter_name is None else names_in(record, adapter_name)[0]
    if (path := _copied(root, name)) is not None:
        raise AdapterError(
            f"adapter {name!r}: it has trained copies (modules_to_save or bias; of {path or 'the model'}), which are "
            "no inputs of the graph. Export a graph of its own for it."
        )
    sites = {path: layer.hra_u for path, layer in sites_of(model).items() if name in layer.hra_u}
    room = {_path(given.name): given for given in inputs if given.name.rpartition(".")[2] == REFLECTION}
    for path in sites:
        if path not in room:
            has = ", ".join(list(room)[:4]) or "none at all"
            raise AdapterError(
                f"{path}: adapter {name!r} acts here, and the graph has no input {path}.{REFLECTION}; it has those of "
                f"{has}. Export it with an adapter on all these layers."
            )
    own = next((reflection[name].dtype for reflection in sites.values()), torch.float32)
    dtypes = {path: _dtype(given, own) for path, given in room.items()}
    return {given.name: _filled(given, sites.get(path), name, dtypes[path]).numpy() for path, given in room.items()}


def _exported(model: nn.Module) -> tuple[str, dict[str, Reflection]]:
    """The adapter that acts, and the reflections of its layers."""
    root, record = root_of(model)
    name = _one(record)
    if (path := _copied(root, name)) is not None:
        raise AdapterError(
            f"{path or 'the model'}: adapter {name!r} has a trained copy of it (modules_to_save or bias), which the "
            f"graph would have for every other adapter too. {_ROOM}"
        )
    reflections = {path: layer.hra_u for path, layer in sites_of(model).items() if name in layer.hra_u}
    for path, reflection in reflections.items():
        odd = {
            "Gram-Schmidt": reflection.specs[name].apply_GS,
            "an anchor (a frozen prefix of reflections)": reflection.anchor(name) is not None,
            "a strength other than 1": name in reflection.scales,
        }
        for reason in (reason for reason, holds in odd.items() if holds):
            raise AdapterError(
                f"{path}: adapter {name!r} has {reason} here, which the graph would put on every other adapter too. "
                f"{_ROOM}"
            )
    return name, reflections


def _one(record: Record) -> str:
    if record.disabled or record.merged or len(record.active) != 1:
        state = "switched off" if record.disabled else f"merged: {list(record.merged)}"
        state = state if record.disabled or record.merged else f"{list(record.active)}"
        raise AdapterError(
            f"adapters {state}: a graph has room for one adapter, which acts. Call hra_fx.set_adapter(model, name)."
        )
    return record.active[0]


def _copied(root: nn.Module, name: str) -> str | None:
    """The first module that an adapter has trained copies of, if there is one."""
    return next((path for path, (_, copies) in copies_of(root).items() if name in copies.copied), None)


def _dtype(given: Input, own: torch.dtype) -> torch.dtype:
    """What an input takes, as far as that is told."""
    kind = str(getattr(given, "type", "")).removeprefix("tensor(").removesuffix(")")
    dtype = _DTYPES.get(kind, own)
    if dtype == torch.bfloat16:
        raise AdapterError(
            f"{given.name}: it is of bfloat16, which numpy does not have. Export the model in float32 or in float16."
        )
    return dtype


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _filled(given: Input, reflection: Reflection | None, name: str, dtype: torch.dtype) -> Tensor:
    """The vectors of a layer, as many as the input takes."""
    width, rank = (int(size) for size in given.shape)
    if reflection is None:
        return torch.zeros(width, rank, dtype=dtype)
    chain = reflection.chain(name).detach().cpu()
    if chain.shape[0] != width or chain.shape[1] > rank:
        raise AdapterError(
            f"{_path(given.name)}: adapter {name!r} is {chain.shape[1]} reflections of width {chain.shape[0]} here, "
            f"and the graph has room for {rank} of width {width}. Export it with an adapter of higher rank."
        )
    return nn.functional.pad(chain.to(dtype), (0, rank - chain.shape[1])).contiguous()
