"""`export_training_step`: forward, loss and backward of a model as one exported program."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hra_fx.compat import NON_PERSISTENT, export_forward_backward, is_exporting, pytree, require
from hra_fx.errors import AdapterError, CaptureError
from hra_fx.example_inputs import normalize_inputs, preserve_rng_state, separated_inputs
from hra_fx.layers.batch import exported_batch
from hra_fx.model.whole import refuse_program
from hra_fx.passes.exported import exporting, without_caches
from hra_fx.passes.inputs import argument_names
from hra_fx.passes.nodes import replace_node

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_TENSORS = ("_parameters", "_buffers", "_modules", NON_PERSISTENT)


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

    The model is exported in its current mode. Call `model.eval()` first to turn dropout off, which does not change what
    is trained.

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
        AdapterError: the loss does not depend on a trained parameter, is missing, or is not finite; `torch.export`
            cannot export the step; or the gradients of the program differ from those of the model.

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
    require("export_training_step")
    refuse_program(model)
    step = _StepModule(model, example_inputs, loss, labels)
    wanted = _gradients_of(step)
    with _unchanged(model), ExitStack() as stack:
        for name, parameter in step.named_parameters():
            if parameter.requires_grad and name not in wanted:
                stack.callback(parameter.requires_grad_(False).requires_grad_, True)
        program = _export(step, model, dynamic_shapes)
    _fill_uninitialized(program)
    _name_outputs(program)
    _check_gradients(program, step, wanted)
    return program


def _export(step: _StepModule, model: nn.Module, dynamic_shapes: Any) -> ExportedProgram:
    if dynamic_shapes is not None:
        dynamic_shapes = {**dict.fromkeys(step.inputs), **dynamic_shapes}
    try:
        # Both calls need the kernels: the first one records attention, and the second one decomposes it.
        with exporting(), without_caches(model), sdpa_kernel([SDPBackend.MATH]), torch.enable_grad():
            forward = torch.export.export(step, step.example(), dynamic_shapes=dynamic_shapes, strict=False)
            program: ExportedProgram = export_forward_backward()(forward)
    except CaptureError as error:
        raise AdapterError(f"export_training_step: {error.reason}.") from error
    return program


def _fill_uninitialized(program: ExportedProgram) -> None:
    """Replace `empty_permuted`: only its shape is used, and ExecuTorch does not have a kernel for it."""
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.empty_permuted.default):
        value: Tensor = node.meta["val"]
        options = {"dtype": value.dtype, "device": value.device}
        filled = replace_node(node, "call_function", torch.ops.aten.full.default, (node.args[0], 0), options)
        filled.meta["val"] = value.contiguous()
    program.graph_module.recompile()


def _name_outputs(program: ExportedProgram) -> None:
    """Make the program return `(loss, {name: gradient})`; torch keeps the output structure of the loss alone."""
    signature = program.graph_signature.backward_signature
    entry = program.module_call_graph[0].signature
    assert signature is not None and entry is not None
    gradients = signature.gradients_to_parameters
    names = [gradients[spec.arg.name] for spec in program.graph_signature.output_specs if spec.arg.name in gradients]
    entry.out_spec = pytree.tree_structure((0, dict.fromkeys(names, 0)))


# --- loss -------------------------------------------------------------------------------------------------------------


class _StepModule(nn.Module):
    """Computes the loss of a model. It has the parameters and buffers of the model, with the same names.

    Attributes:
        inputs: name of each input -> its example. Arguments without a tensor are constants.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, loss: Callable[..., Tensor] | None, labels: Any) -> None:
        """Share the tensors of `model`."""
        super().__init__()
        vars(self).update({name: value for name, value in vars(model).items() if name in _TENSORS})
        self.training = model.training
        args, kwargs = normalize_inputs(example_inputs)
        names = argument_names(model, args, kwargs)
        given = dict(zip(names, (*args, *kwargs.values()), strict=True))
        if labels is not None:
            if loss is None or "labels" in given:
                raise AdapterError(
                    "export_training_step: pass `labels` for `loss`, or in `example_inputs` for a model that computes "
                    "its loss itself."
                )
            given["labels"] = labels
        is_tensor = partial(pytree.tree_any, lambda leaf: isinstance(leaf, Tensor))
        self.inputs = {name: value for name, value in given.items() if is_tensor(value)}

        def forward(*values: Any) -> Tensor:
            now = given | dict(zip(self.inputs, values, strict=True))
            # The run for comparison computes as the model usually does.
            with exported_batch(model.modules()) if is_exporting() else nullcontext():
                positional, keywords = names[: len(args)], names[len(args) :]
                outputs = model(*(now[name] for name in positional), **{name: now[name] for name in keywords})
            if loss is None:
                return _scalar(outputs if isinstance(outputs, Tensor) else getattr(outputs, "loss", None))
            return _scalar(loss(outputs) if labels is None else loss(outputs, now["labels"]))

        # torch.export reads the names of the inputs from the signature.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        vars(forward)["__signature__"] = inspect.Signature([inspect.Parameter(name, kind) for name in self.inputs])
        vars(self)["forward"] = forward

    def example(self) -> tuple[Any, ...]:
        """A copy of the example, in the order of the inputs."""
        return separated_inputs((tuple(self.inputs.values()), {}))[0]


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise AdapterError(
            f"export_training_step: the loss must be a tensor with one value, got {got}. Pass `loss=`, a function of "
            "the outputs and `labels=`; or `labels` in `example_inputs`, if the model computes its loss from them."
        )
    return loss.reshape(())


# --- comparison -------------------------------------------------------------------------------------------------------

#: The largest relative difference between two computations of the same gradient. Rounding in float32 reaches 1e-2, for
#: batch norm over few values; wrong gradients differed by a third or more.
_TOLERANCE = 3e-2
#: The size of a gradient that is zero except for rounding, in units of the rounding of the largest gradient.
_ROUNDING = 30


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Context manager that restores the buffers of a model and the random number generators."""
    buffers = [(part, name, own) for part in model.modules() for name, own in part._buffers.items() if own is not None]
    values = [own.clone() for _, _, own in buffers]
    with preserve_rng_state():
        try:
            yield
        finally:
            for (part, name, own), value in zip(buffers, values, strict=True):
                part._buffers[name] = own
                own.data.copy_(value)


def _gradients_of(step: _StepModule) -> dict[str, Tensor]:
    """The loss, with the name "", and the gradients of all parameters that require them and affect the loss."""
    trained = {name: parameter for name, parameter in step.named_parameters() if parameter.requires_grad}
    with _unchanged(step), torch.enable_grad():
        loss = step(*step.example())
        if not loss.requires_grad:
            raise AdapterError(
                "export_training_step: the loss does not depend on any trained parameter. The model has no active "
                "adapter, or they are merged, disabled, or on layers that the call does not use; or it is detached."
            )
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    found = {name: gradient for name, gradient in zip(trained, gradients, strict=True) if gradient is not None}
    return {"": loss.detach(), **found}


def _check_gradients(program: ExportedProgram, step: _StepModule, wanted: Mapping[str, Tensor]) -> None:
    """Compare the program with the model on the example."""
    with _unchanged(step), torch.no_grad():
        loss, gradients = program.module()(*step.example())
    found: dict[str, Tensor] = {"": loss, **gradients}
    largest = max(float(value.double().norm()) for value in wanted.values())
    for name, value in wanted.items():
        norm, eps = float(value.double().norm()), torch.finfo(torch.promote_types(value.dtype, torch.float32)).eps
        difference = float((found[name].double() - value.double()).norm()) if name in found else norm
        if not difference <= _TOLERANCE * norm + _ROUNDING * eps * largest:  # nor if it is NaN
            raise AdapterError(
                f"export_training_step: {f'the gradient of {name}' if name else 'the loss'} in the program differs "
                f"from PyTorch's by {difference:.1e} (norm {norm:.1e}). torch {torch.__version__} may compute "
                "the backward pass of an operator wrong, and drops custom autograd functions and hooks on "
                "parameters. With 16-bit weights, try float32; with random numbers, call model.eval() first."
            )
