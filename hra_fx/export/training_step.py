"""`export_training_step`: forward, loss and backward of a model as one exported program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hra_fx.compat import export_forward_backward, pytree
from hra_fx.errors import AdapterError, CaptureError
from hra_fx.export.captured import is_program
from hra_fx.export.step import StepModule, check_gradients, gradients_of, unchanged
from hra_fx.layers.quantized import quant_scheme_of
from hra_fx.tracing.exported import exporting, without_caches

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def export_training_step(
    model: nn.Module,
    example_inputs: Any,
    *,
    loss: Callable[..., Tensor] | None = None,
    labels: Any = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> ExportedProgram:
    """Export a training step: forward, loss and backward as one program, for runtimes without Python.

    The positional arguments of the program are the arguments of `example_inputs` that contain tensors, and then
    `labels`; other arguments, such as `None` and flags, are constants. The program returns the loss and the gradients
    of the parameters that require them: those of the adapters, and everything else that the configuration trains. It
    does not update the parameters; an optimizer outside of the program does this. Parameters have the same names as in
    the model.

    Pass the program to `executorch.exir.to_edge` for ExecuTorch's training module, or to
    `torch._inductor.aoti_compile_and_package`. In Python, `step.module()` and a loaded AOTInductor package return
    `(loss, {name: gradient})`.

    The model is exported in its current mode. In train mode, layers with dropout make the gradients random, so they
    cannot be compared. Call `model.eval()` first, which does not change what is trained.

    The backward pass of exported programs is experimental in PyTorch. In torch 2.13, it gives wrong gradients for the
    default attention kernels on CPUs. So attention is exported as basic operators (`SDPBackend.MATH`), and the
    gradients of the program for `example_inputs` are compared with those of the model.

    Args:
        model: a model with adapters, or a `GraphModule` with adapters. Its parameters and gradients are not changed.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        loss: computes the loss, `loss(outputs)` or `loss(outputs, labels)`, a tensor with one value. Without it, the
            model must return the loss: as a tensor, or as `outputs.loss`, like transformers models if `example_inputs`
            has `labels`.
        labels: an example of the second argument of `loss`.
        dynamic_shapes: as in `torch.export.export`, a dict with the names of the arguments of `model.forward`, and
            `"labels"`, as keys. Without it, the program only accepts the shapes of the example.

    Returns:
        The program. Its first output is the loss; the graph signature names the gradients.

    Raises:
        AdapterError: the loss does not depend on a trained parameter, is missing, or is not finite; the gradients
            are random; a layer is quantized; or `torch.export` cannot export the step.
        VerificationError: the gradients of the program differ from those of the model.

    Example:
        >>> import hra_fx
        >>> config = hra_fx.HRAConfig(r=2, target_modules=["0"])
        >>> model = hra_fx.transform(nn.Sequential(nn.Linear(3, 2)), config)
        >>> x, labels = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> step = export_training_step(model, x, loss=nn.functional.cross_entropy, labels=labels)
        >>> value, gradients = step.module()(x, labels)
        >>> list(gradients)
        ['0.hra_u.default']
    """
    _check(model, loss, labels)
    step = StepModule(model, example_inputs, loss, labels)
    wanted = gradients_of(step)
    with unchanged(model), _frozen(parameter for name, parameter in step.named_parameters() if name not in wanted):
        program = _export(step, model, dynamic_shapes)
    _drop_unread(program)
    _fill_uninitialized(program)
    _name_outputs(program)
    check_gradients(program, step, wanted)
    return program


def _check(model: Any, loss: Any, labels: Any) -> None:
    if is_program(model):
        raise AdapterError(
            "export_training_step: expected a model, got an ExportedProgram. Convert it to a model first: "
            "hra_fx.transform(hra_fx.lift(program), config)."
        )
    if not isinstance(model, nn.Module):
        raise AdapterError(f"export_training_step: expected a model, got {type(model).__name__}.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise AdapterError(
            "export_training_step: no parameter requires gradients. Call hra_fx.transform(model, config) first, or "
            "activate an adapter with hra_fx.set_adapter."
        )
    if quantized := next((path for path, part in model.named_modules() if quant_scheme_of(part) is not None), None):
        raise AdapterError(
            f"export_training_step: {quantized} is quantized, and torch cannot export a backward pass through it. Load "
            "the base model in float32, add the adapter with hra_fx.load_adapter, and export that."
        )
    if labels is not None and loss is None:
        raise AdapterError(
            "export_training_step: `labels` needs `loss`, which is called with the outputs and the labels. If the "
            "model computes the loss itself, pass the labels in `example_inputs`."
        )


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context manager in which some parameters do not require gradients."""
    changed = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


def _shapes(step: StepModule, dynamic_shapes: Any) -> dict[str, Any] | None:
    """The dynamic shapes of all inputs."""
    if dynamic_shapes is None:
        return None
    is_dict = isinstance(dynamic_shapes, Mapping)
    if not is_dict or not dynamic_shapes.keys() <= step.inputs.keys():
        got = ", ".join(map(str, dynamic_shapes)) if is_dict else type(dynamic_shapes).__name__
        raise AdapterError(
            "export_training_step: `dynamic_shapes` must be a dict with the names of inputs as keys, which are "
            f"{', '.join(step.inputs)}, got {got}."
        )
    return {name: dynamic_shapes.get(name) for name in step.inputs}


def _export(step: StepModule, model: nn.Module, dynamic_shapes: Any) -> ExportedProgram:
    shapes = _shapes(step, dynamic_shapes)
    try:
        # Both calls need the kernels: the first one records attention, and the second one decomposes it.
        with exporting(), without_caches(model), sdpa_kernel([SDPBackend.MATH]), torch.enable_grad():
            forward = torch.export.export(step, step.example(), dynamic_shapes=shapes, strict=False)
            program: ExportedProgram = export_forward_backward()(forward)
    except CaptureError as error:
        raise AdapterError(f"export_training_step: {error.reason}.") from error
    return program


def _drop_unread(program: ExportedProgram) -> None:
    """Remove the parameters and buffers that the step does not read, such as those of inactive adapters."""
    specs, written = program.graph_signature.input_specs, program.graph_signature.buffers_to_mutate.values()
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    for spec in [spec for spec in specs if spec.target in program.state_dict and spec.target not in written]:
        if nodes[spec.arg.name].users:
            continue
        specs.remove(spec)
        program.graph.erase_node(nodes[spec.arg.name])
        del program.state_dict[str(spec.target)]


def _fill_uninitialized(program: ExportedProgram) -> None:
    """Replace `empty_permuted`: only its shape is used, and ExecuTorch does not have a kernel for it."""
    graph = program.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.empty_permuted.default):
        value: Tensor = node.meta["val"]
        with graph.inserting_before(node):
            options = {"dtype": value.dtype, "device": value.device}
            filled = graph.call_function(torch.ops.aten.full.default, (node.args[0], 0), options)
        filled.meta = {**node.meta, "val": value.contiguous()}
        node.replace_all_uses_with(filled)
        graph.erase_node(node)
    program.graph_module.recompile()


def _name_outputs(program: ExportedProgram) -> None:
    """Make the program return `(loss, {name: gradient})`; torch keeps the output structure of the loss alone."""
    signature = program.graph_signature.backward_signature
    entry = program.module_call_graph[0].signature
    if signature is None or entry is None:
        raise AssertionError("torch's program has no backward pass, or no signature")
    order = {spec.arg.name: index for index, spec in enumerate(program.graph_signature.output_specs)}
    gradients = sorted(signature.gradients_to_parameters.items(), key=lambda item: order[item[0]])
    entry.out_spec = pytree.tree_structure((0, dict.fromkeys((name for _, name in gradients), 0)))
