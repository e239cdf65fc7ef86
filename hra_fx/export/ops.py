r"""The operator `hra_fx::rotate`, which rotates a weight (`W -> W Q`) in one node of a captured graph.

    rotate(Tensor weight, Tensor vectors, Tensor? anchor, bool apply_GS, bool columns) -> Tensor

`weight` is `(out, d)`, a convolution's `(out, c / groups, ...)`, or `(d, out)` if `columns` (transformers' `Conv1D`);
`vectors` is `U: (d, r)`, `anchor` is `A: (d, k)`. Tracers do not see inside the operator: it stays one node in
`run_decompositions`, saving, loading and `torch.compile`, so `fold` can find it. Saved programs contain its argument
names, so these must not change.

The backward pass evaluates the formula again and differentiates it, so second derivatives exist.

    y = linear(x, w)        becomes        h = hra_fx.rotate(w, u, a, apply_GS, columns);  y = linear(x, h)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from hra_fx.export.match import GraphLayer
from hra_fx.functional import householder
from hra_fx.functional.chain import plain_chain
from hra_fx.functional.rotate import rotate_weight
from hra_fx.layers.target import META, NodeTag

# torch does not have types for its libraries.
_LIBRARY: Any = torch.library.Library("hra_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "rotate(Tensor weight, Tensor vectors, Tensor? anchor, bool apply_GS, bool columns) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

#: The operator overload that graph nodes have as their target.
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
    """Disable autocast in any case, because torch does not report in a kernel whether it is on."""
    device = tensor.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


_LIBRARY.impl("rotate", _rotate, "CompositeExplicitAutograd")
torch.library.register_fake("hra_fx::rotate", _fake, lib=_LIBRARY)
torch.library.register_autograd("hra_fx::rotate", _backward, setup_context=_setup_context, lib=_LIBRARY)


def insert_rotation(
    graph: fx.Graph, layer: GraphLayer, weight: fx.Node, vectors: fx.Node, anchor: fx.Node | None, *, apply_GS: bool
) -> None:
    """Rotate the weight of a layer for all its uses, with one node before the first use.

    Args:
        graph: the graph, which is modified.
        layer: a layer of `graph`.
        weight: the node of its weight.
        vectors: the node of its vectors.
        anchor: the node of its anchor, or `None`.
        apply_GS: whether the adapter uses Gram-Schmidt.
    """
    users = {use.first_user for use in layer.uses}
    first = next(node for node in graph.nodes if node in users)
    consumer = next(use.consumer for use in layer.uses if use.first_user is first)
    with graph.inserting_before(first):
        arguments = (weight, vectors, anchor, apply_GS, layer.transposed)
        rotated = graph.create_node("call_function", ROTATE, arguments, {}, name=f"{weight.name}_rotated")
    rotated.meta = {key: consumer.meta[key] for key in ("nn_module_stack", "stack_trace") if key in consumer.meta}
    values = [argument.meta.get("val") if isinstance(argument, fx.Node) else argument for argument in arguments]
    if values[0] is not None and values[1] is not None:
        with torch.no_grad():
            rotated.meta["val"] = ROTATE(*values)
    rotated.meta[META] = NodeTag(layer.path, layer.kind, "reflection")
    for use in layer.uses:
        use.first_user.replace_input_with(use.weight, rotated)


def split_shared_uses(layers: Iterable[GraphLayer], nodes: Mapping[str, list[fx.Node]]) -> None:
    """After all insertions, make other layers with the same weight read it by their own names.

    Args:
        layers: the adapted layers.
        nodes: name of a weight -> its nodes.
    """
    for layer in layers:
        for use, name in layer.others:
            # This does not affect adapted layers, because their first users now read the rotated weight.
            use.first_user.replace_input_with(use.weight, nodes[name][0])


def find_rotate_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of `hra_fx::rotate`, in the order of the graph."""
    return list(graph.find_nodes(op="call_function", target=ROTATE))


def remove_rotation(graph: fx.Graph, rotated: fx.Node) -> list[fx.Node]:
    """Replace a rotated weight with the base weight. Returns the nodes of its vectors, which may now be unused.

    Args:
        graph: the graph, which is modified.
        rotated: one of `find_rotate_nodes(graph)`.
    """
    weight, *adapter = rotated.args[:3]
    assert isinstance(weight, fx.Node)
    rotated.replace_all_uses_with(weight)
    graph.erase_node(rotated)
    return [node for node in adapter if isinstance(node, fx.Node)]
