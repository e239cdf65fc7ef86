"""Compare the gradients of a model and its captured graph, which drops the backward of custom autograd functions.

    y = layer(x)        is run as        y = layer(x) + z

for each layer that can be adapted, with zeros `z`. The gradients of `z` are all that adapters get from the layers after
them, so they do not depend on which parameters are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.errors import CaptureError
from hra_fx.layers.target import find_kind
from hra_fx.tracing.exported import is_leaf


def compare_gradients(
    model: nn.Module, made: nn.Module, run: Callable[[nn.Module], list[Tensor]], called: Collection[str]
) -> None:
    """Compare the gradients of a model and its graph, if the model calls custom autograd functions.

    Args:
        model: the model.
        made: its graph, which calls the model's own layers.
        run: runs the example with a module, and returns the tensors in its result.
        called: the names of functions that are known to be called. Others are found in the backward graph.

    Raises:
        CaptureError: the gradients differ, or the model does not run with gradients.
    """
    with torch.enable_grad():
        try:
            with _changed_outputs(model, _requiring_grad):
                names = sorted({*called, *autograd_functions(run(model))})
        except RuntimeError as error:
            raise CaptureError(f"it does not run with gradients: {str(error).splitlines()[0]}") from error
        if not names:
            return
        try:
            wanted, found = (_gradients(model, partial(run, module)) for module in (model, made))
            same = all(_is_same(found[key], wanted[key]) for key in found.keys() & wanted.keys())
        except RuntimeError:  # a function writes into a tensor that the backward of its operators needs
            same = False
    if not same:
        raise CaptureError(f"it calls the custom autograd function {', '.join(names)}, whose backward a graph drops")


def autograd_functions(outputs: Iterable[Tensor]) -> set[str]:
    """The names of the custom autograd functions in the backward graph of some outputs.

    Example:
        >>> class Double(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return 2 * x
        >>> autograd_functions([Double.apply(torch.ones(2, requires_grad=True)).sum()])
        {'Double'}
    """
    seen, todo = set[Any](), [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    custom = [type(node) for node in seen if isinstance(node, torch.autograd.function.BackwardCFunction)]
    return {cls.__name__.removesuffix("Backward") for cls in custom}


def is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to half of the digits of their dtype."""
    one, other = one.detach(), other.detach()
    limit = torch.finfo(one.dtype).eps ** 0.5 if one.is_floating_point() or one.is_complex() else 0.0
    finite = other[other.isfinite()] if limit else other
    scale = float(finite.abs().max()) if limit and finite.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=limit, atol=limit * scale, equal_nan=True)


def _is_same(found: Tensor | None, wanted: Tensor | None) -> bool:
    """Whether two gradients are equal. If both are zeros, as behind a ReLU, another example may show a difference."""
    if found is None or wanted is None:
        return found is wanted
    return bool(wanted.any()) and is_close(found, wanted)


def _gradients(model: nn.Module, run: Callable[[], list[Tensor]]) -> dict[tuple[str, int], Tensor | None]:
    """The gradients of `z` in one run: (path of the layer, number of its call) -> gradient, `None` if unused."""
    zeros: dict[tuple[str, int], Tensor] = {}

    def add_zeros(path: str, output: Tensor) -> Tensor:
        zero = torch.zeros_like(output, requires_grad=True)
        zeros[path, sum(path == other for other, _ in zeros)] = zero
        return output + zero

    with _changed_outputs(model, add_zeros):
        losses = [output.pow(2).sum() for output in run() if output.requires_grad]
    if not losses or not zeros:
        return dict.fromkeys(zeros)
    found = torch.autograd.grad(torch.stack(losses).sum(), list(zeros.values()), allow_unused=True)
    return dict(zip(zeros, found, strict=True))


def _requiring_grad(path: str, output: Tensor) -> Tensor:
    return output if output.requires_grad else output + output.new_zeros((), requires_grad=True)


@contextmanager
def _changed_outputs(model: nn.Module, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Context manager in which `change` is applied to the outputs of the layers that can be adapted."""

    def hook(path: str, layer: nn.Module, args: Any, output: Any) -> Any:
        is_value = isinstance(output, Tensor) and output.is_floating_point() and torch.is_grad_enabled()
        return change(path, output) if is_value else output

    layers = {path: part for path, part in model.named_modules() if find_kind(part) and is_leaf(part)}
    handles = [layer.register_forward_hook(partial(hook, path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
