r"""The factors of the adapters of several layers, computed together.

The factors of one layer take about a dozen small operators, and so does their gradient. In a batch, the factors of all
layers take the same number of operators. TorchDynamo records the batch as one operator, which AOTAutograd decomposes:

    hra_fx::batched_factors(tensors[], forms[], dtype) -> Tensor[]

`tensors` are the parameters of the first part of each layer's chain, then its kept directions, if it has any; then
those of the second part, and so on. `forms` has an entry for each part (`ChainPart.form`). The result is `R` and `F` of
the first layer, then of the second, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hra_fx import compat
from hra_fx.functional import householder
from hra_fx.functional.chain import ChainPart
from hra_fx.kernels.dispatch import is_compiling
from hra_fx.kernels.factors import Factors, uses_plain_operators, wy_factors


def batched_factors(tensors: list[Tensor], forms: list[int], dtype: torch.dtype) -> list[Factors]:
    """Compute the factors of several layers with chains of the same form. See the top of this file.

    The factors are computed in at least float32, and cast to `dtype`.

    Returns:
        `R` and `F: (k, d)` of each layer. In the backward pass, a layer with unused factors does not get a gradient.

    Example:
        >>> vectors = torch.tensor([[3.0], [0.0]])
        >>> [(rows, down)] = batched_factors([vectors], [0], torch.float32)
        >>> torch.eye(2) + down.T @ rows
        tensor([[-1.,  0.],
                [ 0.,  1.]])
    """
    compute = torch.ops.hra_fx.batched_factors.default if is_compiling() else _compute
    factors = compute(tensors, forms, dtype)
    return list(zip(factors[::2], factors[1::2], strict=True))


def _compute(tensors: list[Tensor], forms: list[int], dtype: torch.dtype) -> list[Tensor]:
    stack, unbind = _gradients_where_reached()
    factors = wy_factors(_chains(tensors, forms, stack), _again(tensors, forms))
    return list(unbind(factors.to(dtype)))


def _chains(tensors: list[Tensor], forms: list[int], stack: Callable[..., Tensor]) -> Tensor:
    """The chains of all layers, `(n, d, k)`; `stack` stacks the parameters of a part."""
    layers = len(tensors) // sum(map(ChainPart.size, forms))
    groups = iter([tensors[start : start + layers] for start in range(0, len(tensors), layers)])
    chains = []
    for form in forms:
        vectors = stack(next(groups))
        with householder.without_autocast(vectors):
            wide = vectors.to(householder.working_dtype(vectors.dtype))
            kept = [torch.stack(next(groups)) for _ in range(ChainPart.size(form) - 1)]
            chains.append(ChainPart.of_form(form, wide, *kept).chain())
    return chains[0] if len(chains) == 1 else torch.cat(chains, dim=-1)


def _again(tensors: list[Tensor], forms: list[int]) -> Callable[[], Tensor] | None:
    """Return a function that computes the chains again for another backward pass. The vectors must not have changed."""
    if not torch.is_grad_enabled() or uses_plain_operators():
        return None
    versions = compat.tensor_versions(tensors)

    def again() -> Tensor:
        gone = any(tensor.untyped_storage().size() == 0 for tensor in tensors)
        if gone or versions != compat.tensor_versions(tensors):
            raise RuntimeError(
                "the vectors of an adapter were modified by an in-place operation, such as an optimizer step, or "
                "freed, between two backward passes of one forward. Run the forward again before the second one."
            )
        with torch.no_grad():
            return _chains(tensors, forms, torch.stack)

    return again


_LIBRARY: Any = torch.library.Library("hra_fx", "FRAGMENT")  # type: ignore[no-untyped-call]  # not typed by torch
_LIBRARY.define(
    "batched_factors(Tensor[] tensors, int[] forms, ScalarType dtype) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("batched_factors", _compute, "CompositeImplicitAutograd")


def _gradients_where_reached() -> tuple[Any, Any]:
    """Return stack and unbind functions that only give gradients to layers that the backward pass has reached.

    This matters because an optimizer changes parameters with a zero gradient (by their momentum), but not parameters
    without a gradient.
    """
    if not torch.is_grad_enabled() or uses_plain_operators():
        return torch.stack, lambda factors: factors.flatten(0, 1).unbind()
    reached: set[int] = set()
    return (lambda tensors: _Stack.apply(reached, *tensors)), (lambda factors: _Unbind.apply(reached, factors))  # type: ignore[no-untyped-call]


class _Stack(torch.autograd.Function):
    """`torch.stack`, with a gradient only for tensors of layers that the backward pass has reached."""

    @staticmethod
    def forward(ctx: Any, reached: set[int], *tensors: Tensor) -> Tensor:
        ctx.reached = reached
        return torch.stack(tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[part if index in ctx.reached else None for index, part in enumerate(grad.unbind())]


class _Unbind(torch.autograd.Function):
    """`(n, 2, k, d)` to `R` and `F` of each layer; the backward records which layers it has reached."""

    @staticmethod
    def forward(ctx: Any, reached: set[int], stacked: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        sides = stacked.flatten(0, 1)
        ctx.reached, ctx.shape, ctx.options = reached, sides.shape[1:], {"dtype": sides.dtype, "device": sides.device}
        return sides.unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor]:
        ctx.reached.clear()  # from an earlier backward pass
        ctx.reached.update([place // 2 for place, grad in enumerate(grads) if grad is not None])
        filled = [torch.zeros(ctx.shape, **ctx.options) if grad is None else grad for grad in grads]
        return None, torch.stack(filled).view(-1, 2, *ctx.shape)
