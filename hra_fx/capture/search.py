"""Finding the largest regions: the whole model, else its parts, down to layers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hra_fx.capture.admission import recorded_classes, why_not_root
from hra_fx.capture.calling import unobserved
from hra_fx.capture.observing import NOTHING, Observed
from hra_fx.capture.reads import functional_reads
from hra_fx.capture.region import Region
from hra_fx.capture.trace import trace
from hra_fx.carrier.swap import original_class
from hra_fx.errors import CaptureError


@dataclass
class Findings:
    """What capture gives for one model.

    Attributes:
        regions: path of the region's root -> region.
        alone: path of a site that is in no region -> the reason.
        read: path of a site whose weight a graph reads -> by what.
    """

    regions: dict[str, Region] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)
    read: dict[str, str] = field(default_factory=dict)


def find_regions(model: nn.Module, sites: Mapping[str, nn.Module], seen: Observed = NOTHING) -> Findings:
    """Capture `model` in regions that are as large as the guards allow; the model is as it was.

    Args:
        model: the model.
        sites: path -> layer, as selected.
        seen: what a call of the model showed, where there was one.
    """
    findings = Findings()
    layers = set(sites.values())
    recorded = recorded_classes(model)

    def visit(path: str, module: nn.Module, why: str) -> None:
        below = {name: part for name, part in module.named_modules() if part in layers}
        if not below:
            return
        if module in layers:
            findings.alone |= {f"{path}.{name}".strip("."): why for name in below}
            return
        # A container is never called, and a part with one site gains nothing over the layer alone: the reason is that
        # of the parent.
        if path and (len(below) == 1 or type(module).forward is nn.Module.forward):
            for name, child in module.named_children():
                visit(f"{path}.{name}", child, why)
            return
        try:
            reason = _refuse_or_capture(findings, path, module, below, recorded, why, seen)
        except CaptureError as error:
            reason = error.reason
        if reason is not None:
            for name, child in module.named_children():
                visit(f"{path}.{name}".lstrip("."), child, f"{path or 'the model'} ({type(module).__name__}): {reason}")

    visit("", model, "")
    return findings


def _refuse_or_capture(
    findings: Findings,
    path: str,
    module: nn.Module,
    below: Mapping[str, nn.Module],
    recorded: tuple[type, ...],
    why: str,
    seen: Observed,
) -> str | None:
    kind: Any = original_class(module)
    calling = seen.callings.get(path)
    if isinstance(calling, str):
        return calling
    if reason := why_not_root(module, is_model=not path or calling is not None):
        return reason
    calling = calling or unobserved(kind)
    traces = trace(module, below, recorded, calling)
    read: dict[str, str] = {}
    for graph in (traces.train, traces.eval):
        for site, reader in functional_reads(graph, below).items():
            read[site] = f"{path or 'the model'} ({type(module).__name__}, at node {reader.name!r} of its graph)"
    if missed := sorted(site for site in below if site not in read and not _runs_in(site, traces.called)):
        return f"its traced forward does not call {missed[0]}"
    findings.read |= {f"{path}.{site}".lstrip("."): reader for site, reader in read.items()}
    findings.regions[path] = Region(module, traces, frozenset(below), why, calling)
    return None


def _runs_in(site: str, called: frozenset[str]) -> bool:
    """Whether a site is called, or lies in a module that is called as a whole, and so runs its own Python forward."""
    return any(site == path or site.startswith(f"{path}.") for path in called)
