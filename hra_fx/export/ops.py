r"""The operator `hra_fx::rotate`: the rotated weight `W -> W Q` as one node of a captured graph.

    rotate(Tensor weight, Tensor vectors, Tensor? anchor, bool apply_GS, bool columns) -> Tensor

`weight` is `(out, d)`, a convolution's `(out, c / groups, ...)`, or `(d, out)` if `columns` (transformers' `Conv1D`);
`vectors` is `U: (d, r)`, `anchor` is `A: (d, k)`. The operator is opaque to tracers: it stays one node in
`run_decompositions`, saving, loading and `torch.compile`, so `fold` can find it. Saved programs contain its argument
names, so these must not change.

Its gradient is that of the same formula, evaluated again, so second derivatives exist.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.functional.chain import plain_chain
from hra_fx.functional.rotate import rotate_weight

# torch has no types for its libraries.
_LIBRARY: Any = torch.library.Library("hra_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "rotate(Tensor weight, Tensor vectors, Tensor? anchor, bool apply_GS, bool columns) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

#: The overload that is the target of graph nodes.
ROTATE = torch.ops.hra_fx.rotate.default


def _rotate(weight: Tensor, vectors: Tensor, anchor: Tensor | None, apply_GS: bool, columns: bool) -> Tensor:
    dtype = householder.working_dtype(torch.promote_types(weight.dtype, vectors.dtype))
    with _no_autocast(weight):
        chain = plain_chain(vectors.to(dtype), anchor, apply_GS=apply_GS)
        return rotate_weight(weight, chain, transposed=columns)


def _fake(weight: Tensor, vectors: Tensor, anchor: Tensor | None, apply_GS: bool, columns: bool) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.apply_GS, ctx.columns = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, vectors, anchor = ctx.saved_tensors
    again = torch.is_grad_enabled()  # create_graph=True
    with torch.enable_grad():
        inputs = weight.view_as(weight), vectors.view_as(vectors)
        rotated = _rotate(*inputs, anchor, ctx.apply_GS, ctx.columns)
    wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(rotated, wanted, grad, create_graph=again))
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None, None


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Disable autocast, always: inside of a kernel torch does not report whether it is on."""
    device = tensor.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


_LIBRARY.impl("rotate", _rotate, "CompositeExplicitAutograd")
torch.library.register_fake("hra_fx::rotate", _fake, lib=_LIBRARY)
torch.library.register_autograd("hra_fx::rotate", _backward, setup_context=_setup_context, lib=_LIBRARY)
