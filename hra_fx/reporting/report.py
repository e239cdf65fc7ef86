"""`report`: where the reflections are, in what region, and what they do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, fx, nn

from hra_fx.export.captured import is_captured
from hra_fx.export.inspect import carried, spare
from hra_fx.export.program import is_program
from hra_fx.layers.target import describe
from hra_fx.model.graph_module import shown_in
from hra_fx.model.state import record_of, require_sites
from hra_fx.reporting.measuring import chain_of, share_of, turn_of, weight_rows
from hra_fx.reporting.result import Report
from hra_fx.reporting.row import Place, Row
from hra_fx.reporting.skipped_layers import Missed, Question, missed_in, reason_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def report(model: nn.Module | ExportedProgram) -> Report:
    """Describe every adapted layer of a transformed model, and name the layers that were left out.

    Nothing of the size of a weight is made: the angles come from matrices of the number of reflections, the share of
    the weight from one product with as many columns.

    Args:
        model: a transformed model, or an exported program or captured graph that was transformed.

    Returns:
        A `Report`: rows as data, and a table when printed.

    Raises:
        AdapterError: the model has no reflections.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
        >>> row = report(model).rows[0]
        >>> row.path, row.region, row.d, row.r, row.angles
        ('0', 'whole', 6, 2, ())
    """
    if is_program(model) or is_captured(model):
        return _report_of_captured(model)
    module: Any = model
    return Report(_rows(module), missed_in(module))


def _rows(model: nn.Module) -> tuple[Row, ...]:
    sites = require_sites(model)
    shown = shown_in(model)
    record = record_of(model)
    rows: list[Row] = []
    for path, layer in sites.items():
        place = Place("alone", path, 1, "")
        if path in shown:
            place = Place("whole", "", len(shown), "")
        weight, reflection = weight_rows(layer), layer.hra_u
        for name in reflection:
            active = name in (record.active if record else reflection.active)
            r = reflection.specs[name].r
            what = _What(path, describe(layer), not reflection.is_called, name, active, reflection.width, r)
            rows.append(_row(what, place, chain_of(layer, name), weight))
    return tuple(rows)


class _What(NamedTuple):
    """An adapter at a layer, as the fields of a row tell."""

    path: str
    site: str
    on_weight: bool
    adapter: str
    active: bool
    d: int
    r: int


def _row(what: _What, place: Place, chain: Tensor | None, weight: Tensor | None) -> Row:
    turned = turn_of(chain)
    return Row(
        **what._asdict(),
        **place._asdict(),
        parameters=what.d * what.r,
        rotation=turned.rotation,
        angle=turned.angle,
        mean_angle=turned.mean_angle,
        angles=turned.angles,
        orthogonality=turned.orthogonality,
        share=share_of(weight, chain),
    )


def _report_of_captured(captured: Any) -> Report:
    """The report of a program or of its module, which is one graph that rotates weights."""
    found = carried(captured)
    place = Place("whole", "", len({layer.path for layer in found}), "")
    rows = []
    for layer in found:
        what = _What(layer.path, layer.site, True, layer.adapter, True, layer.chain.shape[0], layer.r)
        rows.append(_row(what, place, layer.chain, layer.rows))
    return Report(tuple(rows), _missed_in_captured(captured))


def _missed_in_captured(captured: fx.GraphModule | ExportedProgram) -> tuple[Missed, ...]:
    left = spare(captured)
    config = left.config
    questions = {} if config is None else {left.adapter: Question(left.outline, config)}
    found = []
    for path, (kind, words, refusal) in left.sites.items():
        reason = refusal
        if reason is None and questions:
            reason = reason_of(questions, path, kind)
        found.append(Missed(path, words, reason or "nobody knows: the graph has lost what its adapter asked for"))
    return tuple(found)
