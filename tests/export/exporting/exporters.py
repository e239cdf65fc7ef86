"""Exporters with their runtimes: functions that export a program, run it and return the output.

Each function imports its own libraries, because not all of them need to be installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Exporter:
    """One exporter.

    Attributes:
        title: its column in the table.
        run: exports a program, and runs it with inputs.
        package: the package that must be installed.
        dynamic: whether the program has dynamic shapes, and runs with other sizes than those of the export.
    """

    title: str
    run: Callable[[ExportedProgram, Inputs], Tensor]
    package: str
    dynamic: bool = True


def saved_program(program: ExportedProgram, inputs: Inputs) -> Tensor:
    """torch.export, saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pt2")
        torch.export.save(program, path)
        result: Tensor = torch.export.load(path).module()(*inputs)
    return result


def onnx(program: ExportedProgram, inputs: Inputs) -> Tensor:
    """torch.onnx and onnxruntime, with a file."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        torch.onnx.export(program, dynamo=True, verbose=False).save(path)  # type: ignore[union-attr]
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        fed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])


def aot_inductor(program: ExportedProgram, inputs: Inputs) -> Tensor:
    """AOTInductor."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model.pt2"))
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        result: Tensor = torch._inductor.aoti_load_package(path)(*inputs)
    return result


def openvino(program: ExportedProgram, inputs: Inputs) -> Tensor:
    """OpenVINO on the CPU, in float32."""
    import openvino

    converted = openvino.convert_model(program)
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([tensor.numpy() for tensor in inputs])[0])


def executorch(program: ExportedProgram, inputs: Inputs) -> Tensor:
    """ExecuTorch with its portable kernels."""
    return _executorch(program, inputs, [])


def executorch_xnnpack(program: ExportedProgram, inputs: Inputs) -> Tensor:
    """ExecuTorch with XNNPACK for the parts of the graph that it supports."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return _executorch(program, inputs, [XnnpackPartitioner()])


def _executorch(program: ExportedProgram, inputs: Inputs, partitioners: list[object]) -> Tensor:
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    made = to_edge_transform_and_lower(program, partitioner=partitioners).to_executorch()
    result: Tensor = Runtime.get().load_program(made.buffer).load_method("forward").execute(inputs)[0]
    return result.clone()


EXPORTERS = {
    "torch.export": Exporter("torch.export, saved", saved_program, "torch"),
    "onnx": Exporter("ONNX, onnxruntime", onnx, "onnxruntime"),
    "aoti": Exporter("AOTInductor", aot_inductor, "torch"),
    "openvino": Exporter("OpenVINO", openvino, "openvino"),
    "executorch": Exporter("ExecuTorch", executorch, "executorch", dynamic=False),
    "xnnpack": Exporter("ExecuTorch, XNNPACK", executorch_xnnpack, "executorch", dynamic=False),
}
