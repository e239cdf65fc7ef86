"""Capture a model into one GraphModule that calls its layers, with `torch.export`, from an example call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import pytree
from hra_fx.errors import CaptureError
from hra_fx.model.example_inputs import Call, clone_inputs, preserve_rng_state, seed_everything
from hra_fx.tracing.canonical import canonical
from hra_fx.tracing.exported import all_dynamic, batch_dynamic, export_call, is_leaf, with_batch_of_two, without_caches
from hra_fx.tracing.forward_state import Snapshot, checked_capture
from hra_fx.tracing.inputs import InputChecks, argument_names, more_than_one
from hra_fx.tracing.trace import LOCK
from hra_fx.tracing.two_modes import in_both_modes

_SEED = 20240517


def capture_layers(
    model: nn.Module, call: Call, dynamic_shapes: Any = None, *, is_trained: bool = True
) -> fx.GraphModule:
    """Capture one call of a model, for other sizes and both modes.

    Args:
        model: the model; it is not changed.
        call: the example call.
        dynamic_shapes: the sizes that may change, as in `torch.export.export`. By default all may change, but of images
            only the batch, as far as the model allows it: the graph checks its inputs.
        is_trained: refuse a graph whose gradients or random numbers would not be those of the model.

    Returns:
        A graph over the model's own modules and parameters, which is called as the model is with these arguments. It
        calls layers of torch and those that can be adapted, and has operators for everything else. An output that
        `torch.export` does not know, such as a cache, is `None`.

    Raises:
        CaptureError: `torch.export` cannot capture the call, or see `is_trained`.
    """
    _refuse_state(model, is_trained=is_trained)
    modes = {path: part.training for path, part in model.named_modules(remove_duplicate=False)}
    with LOCK, _unchanged(model), torch.inference_mode(False):
        makers = [all_dynamic, batch_dynamic] if dynamic_shapes is None else [lambda *_: dynamic_shapes]
        tries = [(with_batch_of_two(call) if dynamic_shapes is None else call, make) for make in makers]
        if dynamic_shapes is None:
            tries.append((call, all_dynamic))  # for models that allow a single batch size
        for example, make in tries:
            try:
                made = _captured(model, example, make, call, is_trained=is_trained)
                break
            except CaptureError as error:
                failure = error
        else:
            raise failure
    for path, part in made.named_modules(remove_duplicate=False):
        part.training = modes.get(path, model.training)
    return made


def _refuse_state(model: nn.Module, *, is_trained: bool) -> None:
    """Refuse a model without values, and one that checkpoints its activations, which a graph would not.

    Raises:
        CaptureError: see above.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CaptureError(f"{name} is on the meta device. Load the weights first")
    for path, part in model.named_modules():
        if is_trained and getattr(part, "gradient_checkpointing", False) is True:
            raise CaptureError(f"{path or 'it'} checkpoints its activations, which a graph drops. Disable that first")


def _captured(
    model: nn.Module, example: Call, make_shapes: Callable[[nn.Module, Call], Any], call: Call, *, is_trained: bool
) -> fx.GraphModule:
    """The graph of an example, compared with the model for a call."""
    parts = ((path, part) for path, part in model.named_modules() if not is_leaf(part))
    odd = next((path for path, part in parts if part.training != model.training), None)
    try:
        shapes = make_shapes(model, example)
    except TypeError as error:
        raise CaptureError(f"the example does not fit its forward: {error}") from error
    modes, functions = [], list[str]()
    for training in (True, False):
        with checked_capture(model) if is_trained else nullcontext(list[str]()) as called:
            program = export_call(model, example, shapes, training=training)
        functions += called
        modes.append(canonical(program, model))
    checks = InputChecks(modes[0].conditions, modes[1].conditions)
    made = in_both_modes(model, modes[0], modes[1], checks, odd)
    for training in (True, False):
        _compare(model.train(training), made.train(training), call, functions)
    for places in modes[0].sizes:
        if not _allows_one(model, made, example, places):
            checks.add(more_than_one(*places[0], argument_names(model, *example)))
    return made


def _allows_one(model: nn.Module, made: nn.Module, call: Call, places: list[tuple[int, int]]) -> bool:
    """Whether the graph is right where a size is 1; torch.export assumes that it is not.

    Args:
        model: the model.
        made: its graph.
        call: a call.
        places: (index of the input, dimension) of all inputs with this size.
    """
    leaves, spec = pytree.tree_flatten(call)
    for index, dimension in places:
        leaves[index] = leaves[index].narrow(dimension, 0, 1)
    smaller = pytree.tree_unflatten(leaves, spec)
    for training in (True, False):
        with torch.no_grad(), without_caches(model):
            try:
                wanted, found = (_outputs(each.train(training), smaller) for each in (model, made))
            except Exception:  # of the model, which does not allow it; or of the graph, which is not a wrong output
                continue
        if not all(map(_close, found, wanted)):
            return False
    return True


def _compare(model: nn.Module, made: nn.Module, call: Call, functions: list[str]) -> None:
    """Run a call through the model and its graph, and compare gradients too if there are custom autograd functions.

    Raises:
        CaptureError: the graph does not run, or gives other values.
    """
    with without_caches(model), torch.set_grad_enabled(bool(functions)):
        wanted = _outputs(model, call)
        try:
            found = _outputs(made, call)
        except AssertionError as error:
            raise CaptureError(f"its graph does not run on the example: {error}") from error
        if not all(map(_close, found, wanted)):
            mode = "train" if model.training else "eval"
            raise CaptureError(f"in {mode} mode the graph gives other outputs for the example than the model")
        try:
            same = not functions or all(map(_close, _gradients(made, found), _gradients(model, wanted)))
        except RuntimeError:  # the function writes into a tensor that the backward of its operators needs
            same = False
        if not same:
            raise CaptureError(f"it calls the custom autograd function {functions[0]}, whose backward a graph drops")


def _outputs(model: nn.Module, call: Call) -> list[Tensor]:
    """The tensors in the result of a call, which runs with copies of the buffers."""
    seed_everything(_SEED)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    output = torch.func.functional_call(model, buffers, *clone_inputs(call))
    return [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor)]


def _gradients(model: nn.Module, outputs: list[Tensor]) -> list[Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = [output.pow(2).sum() for output in outputs if output.requires_grad]
    if not parameters or not losses:
        return []
    return list(torch.autograd.grad(torch.stack(losses).sum(), parameters, allow_unused=True, materialize_grads=True))


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, up to half of the digits of their dtype."""
    one, other = one.detach(), other.detach()
    limit = torch.finfo(one.dtype).eps ** 0.5 if one.is_floating_point() or one.is_complex() else 0.0
    scale = float(other.abs().max()) if limit and other.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=limit, atol=limit * scale, equal_nan=True)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """A block that leaves no trace in the attributes of a model, nor in random number generators."""
    with ExitStack() as restore:
        restore.callback(Snapshot(model).restore)
        restore.enter_context(preserve_rng_state())
        yield
