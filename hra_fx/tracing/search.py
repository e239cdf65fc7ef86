"""Finding the largest regions: the whole model, else its parts, down to layers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hra_fx.errors import CaptureError
from hra_fx.layers.class_swap import original_class
from hra_fx.tracing.admission import recorded_classes, why_not_root
from hra_fx.tracing.call_signature import unobserved
from hra_fx.tracing.observing import NOTHING, Observed
from hra_fx.tracing.region import Region
from hra_fx.tracing.trace import is_within, trace
from hra_fx.tracing.weight_reads import functional_reads


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
    search = _Search(model, sites, seen)
    search.visit("", model, "")
    return search.findings


class _Search:
    """A walk from the model down to its layers, which stops at the first module that can be a region."""

    def __init__(self, model: nn.Module, sites: Mapping[str, nn.Module], seen: Observed) -> None:
        self.findings = Findings()
        self._seen = seen
        # A shared layer has several paths, and one name.
        self._names = {layer: path for path, layer in sites.items()}
        self._recorded = recorded_classes(model)

    def visit(self, path: str, module: nn.Module, why: str) -> None:
        """Look at a module; `why` is the reason for which what is above it is no region."""
        below = {name: part for name, part in module.named_modules() if part in self._names}
        if not below:
            return
        if module in self._names:
            for part in below.values():
                self.findings.alone.setdefault(self._names[part], why)
            return
        # A container is never called, and a part with one site gains nothing over the layer alone: the reason is that
        # of the parent.
        if path and (len(below) == 1 or type(module).forward is nn.Module.forward):
            self._visit_children(path, module, why)
            return
        try:
            reason = self._refuse_or_capture(path, module, below, why)
        except CaptureError as error:
            reason = error.reason
        if reason is not None:
            self._visit_children(path, module, f"{path or 'the model'} ({type(module).__name__}): {reason}")

    def _visit_children(self, path: str, module: nn.Module, why: str) -> None:
        for name, child in module.named_children():
            self.visit(f"{path}.{name}".lstrip("."), child, why)

    def _refuse_or_capture(self, path: str, module: nn.Module, below: Mapping[str, nn.Module], why: str) -> str | None:
        calling = self._seen.callings.get(path)
        if isinstance(calling, str):
            return calling
        if reason := why_not_root(module, is_model=not path or calling is not None):
            return reason
        kind: Any = original_class(module)
        calling = calling or unobserved(kind)
        traces = trace(module, below, self._recorded, calling)
        where = f"{path or 'the model'} ({kind.__name__}"
        read: dict[str, str] = {}
        for graph in {id(graph): graph for graph in (traces.train, traces.eval)}.values():
            for site, reader in functional_reads(graph, below).items():
                read[site] = f"{where}, at node {reader.name!r} of its graph)"
        # One that lies in a module which is called as a whole runs its own Python forward there.
        if missed := sorted(site for site in below if site not in read and not is_within(site, traces.called)):
            return f"its traced forward does not call {missed[0]}"
        region = Region(module, traces, frozenset(below), why, calling)
        self.findings.read |= {self._names[below[site]]: reader for site, reader in read.items()}
        self.findings.regions[path] = region
        return None
