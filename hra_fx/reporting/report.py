"""`report`: describe what each adapter does at each layer, and list layers without an adapter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hra_fx.export.captured import adapter_layers, check_is_program, is_captured
from hra_fx.layers.accelerate_hooks import loaded
from hra_fx.layers.sharding import local_tensor
from hra_fx.layers.target import describe, weight_place
from hra_fx.model.state import get_state, require_adapted_layers
from hra_fx.reporting.result import Report
from hra_fx.reporting.row import Row, chain_of, change_of, turn_of, weight_rows
from hra_fx.reporting.skipped_layers import not_adapted, not_adapted_in_program, skipped_parameters
from hra_fx.tracing import graphs as tracing

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def report(model: nn.Module | ExportedProgram, *, capture: bool = False) -> Report:
    """Describe what each adapter does at each layer, and list the layers and 3-D parameters without an adapter.

    The angles are computed from matrices of size `r x r`, and the change of the weight from one product of the weight
    with a thin matrix, so no `d x d` matrix is created.

    Args:
        model: a transformed model or `ExportedProgram`.
        capture: also trace the model, and fill `Row.graph` and `Row.graph_reason`.

    Returns:
        A `Report`. It contains the rows as data, and printing it shows a table.

    Raises:
        AdapterError: the model has no adapters.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
        >>> row = report(model).rows[0]
        >>> row.path, row.layer_type, row.d, row.r, row.angles
        ('0', 'Linear 6->8', 6, 2, ())
    """
    if is_captured(model):
        check_is_program(model, "report")
        return _report_of_program(model, capture=capture)
    module: Any = model
    skipped, trained = not_adapted(module)
    return Report(_rows(module, capture=capture), skipped, trained, skipped_parameters(module))


def _rows(model: nn.Module, *, capture: bool) -> tuple[Row, ...]:
    layers, state = require_adapted_layers(model), get_state(model)
    graphs = tracing.capture(model, layers).layers if capture else {}
    rows: list[Row] = []
    for path, layer in layers.items():
        reflection = layer.hra_u
        with loaded(weight_place(layer)[0]):
            weight = weight_rows(layer)
        for name in reflection:
            active = name in (state.active if state else reflection.active)
            d, r = reflection.width, reflection.specs[name].r
            parameters = math.prod(reflection.vectors_shape(r))
            graph, reason = graphs.get(path, (None, ""))
            with loaded(reflection):
                measured = _measured(chain_of(layer, name), weight)
            sizes = {
                "bytes": parameters * reflection[name].itemsize,
                "bytes_here": local_tensor(reflection[name]).nbytes,
            }
            made = Row(path, describe(layer), name, active, d, r, parameters, **measured, **sizes)
            rows.append(replace(made, graph=graph, graph_reason=reason))
    return tuple(rows)


def _report_of_program(program: Any, *, capture: bool) -> Report:
    """The report of an `ExportedProgram`, which is one graph."""
    rows = []
    for layer in adapter_layers(program):
        d, measured = layer.chain.shape[0], _measured(layer.chain, layer.rows)
        row = Row(layer.path, layer.description, layer.adapter, True, d, layer.r, d * layer.r, **measured)
        rows.append(replace(row, graph="") if capture else row)
    return Report(tuple(rows), *not_adapted_in_program(program))


def _measured(chain: Tensor | None, weight: Tensor | None) -> dict[str, Any]:
    """The measured fields of a row."""
    found = turn_of(chain)
    angles = {"angle": found.angle, "mean_angle": found.mean_angle}
    changed = change_of(weight, chain)
    return {**found._asdict(), **angles, "share": changed.share, "weight_change": changed.change}
