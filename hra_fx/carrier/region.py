"""The carrier of regions: a module whose forward is the compiled graph of its region, where that may stand for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hra_fx.capture.region import Region
from hra_fx.carrier.swap import Carrier

_ATTRIBUTE = "_hra_region"


class RegionCarrier(Carrier):
    """A module with a region of its own."""

    _hra_region: Region

    @classmethod
    def wrap(cls, base: type) -> Callable[..., Any]:
        """The region's graph for this call, else `base.forward`."""
        python_forward = base.forward  # type: ignore[attr-defined]

        @functools.wraps(python_forward)
        def forward(self: RegionCarrier, *args: Any, **kwargs: Any) -> Any:
            program = self._hra_region.program(self, args, kwargs)
            return python_forward(self, *args, **kwargs) if program is None else program(self, *args)

        return forward
