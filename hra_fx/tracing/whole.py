"""Whole graphs of a model, for one call."""

from __future__ import annotations

from torch import fx, nn

from hra_fx.errors import AdapterError
from hra_fx.layers.class_swap import original_class
from hra_fx.model.example_inputs import Call
from hra_fx.model.state import adapted_layers
from hra_fx.tracing.annotate import mark
from hra_fx.tracing.lift import lift, names_in
from hra_fx.tracing.record import error_of, record_pieces, record_whole, twin


def whole_graphs(model: nn.Module, call: Call) -> dict[str, fx.GraphModule]:
    """What TorchDynamo makes of one call: `{"": graph}`, or with graph breaks `{"call[0]": graph, "call[1]": ...}`.

    Raises:
        AdapterError: the model does not run on these inputs, or TorchDynamo has no graph of it.
    """
    names = names_in(model)
    recorded = record_whole(model, call)
    found = _in_pieces(model, call) if recorded is None else {"": lift(recorded, model, names, call)}
    if not any(_computes(module) for module in found.values()):
        raise _failure(original_class(model).__name__, "TorchDynamo found no operator on tensors in this call")
    sites = adapted_layers(model)
    for module in found.values():
        mark(module.graph, sites)
    return found


def _in_pieces(model: nn.Module, call: Call) -> dict[str, fx.GraphModule]:
    kind = original_class(model).__name__
    try:
        copied = twin(model)
    except Exception as error:
        reason = f"its call has graph breaks, and it cannot be copied to run the copy ({_short(error)})"
        raise _failure(kind, reason) from error
    try:
        recorded = record_pieces(copied, call)
    except Exception as error:
        if own := error_of(copied, call):
            raise AdapterError(
                f"{kind}: it does not run on example_inputs ({_short(own)}). Give the inputs of a call that works."
            ) from own
        raise _failure(kind, f"TorchDynamo cannot record this call ({_short(error)})") from error
    names = names_in(copied)
    return {f"call[{index}]": lift(piece, model, names) for index, piece in enumerate(recorded)}


def _computes(module: fx.GraphModule) -> bool:
    return any(node.op.startswith("call_") for node in module.graph.nodes)


def _failure(kind: str, reason: str) -> AdapterError:
    return AdapterError(
        f"{kind}: {reason}. hra_fx.graphs(model), without inputs, gives the parts that torch.fx can trace."
    )


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
