"""The carrier of regions: a module whose forward is the compiled graph of its region, where that may stand for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hra_fx.carrier.looking import can_look, look
from hra_fx.layers.adapted_layer import SiteCarrier
from hra_fx.layers.class_swap import Carrier
from hra_fx.tracing.region import Region

#: Attribute under which a region's root keeps its region.
REGION = "_hra_region"


class RegionCarrier(Carrier):
    """A module with a region of its own."""

    _hra_height = 1
    _hra_region: Region

    @classmethod
    def wrap(cls, base: type) -> dict[str, Callable[..., Any]]:
        """The region's graph for this call, else `base.forward`; a new object of this class has no region."""
        python_forward = base.forward  # type: ignore[attr-defined]

        @functools.wraps(python_forward)
        def forward(self: RegionCarrier, *args: Any, **kwargs: Any) -> Any:
            region: Region | None = vars(self).get(REGION)
            program = region.program(self, args, kwargs) if region else None
            if program is not None:
                run, tensors = program
                return run(self, *tensors)
            if region is None or torch.compiler.is_compiling() or not can_look() or not region.is_new(self):
                return python_forward(self, *args, **kwargs)
            # What the graph did not show, for it is of another call or other facts, may read weights.
            below = ((path, part) for path, part in self.named_modules() if path in region.sites)
            sites = {path: part for path, part in below if isinstance(part, SiteCarrier) and part.hra_u.active}
            return look(self, sites, python_forward, args, kwargs)

        return {"forward": forward}
