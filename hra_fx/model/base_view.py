"""A model as it was before it was transformed, for a while: for what has to see its own classes and names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from hra_fx.carrier.region import REGION, RegionCarrier
from hra_fx.layers.adapted_layer import SiteCarrier, carrier_for
from hra_fx.layers.class_swap import unswap
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.model.state import RECORD


@contextmanager
def laid_bare(model: nn.Module) -> Iterator[None]:
    """The model as it was before it was transformed, but for tensors that stand in place of its own."""
    with ExitStack() as dress:
        for module in list(model.modules()):
            kind = type(module)
            for carrier in (SiteCarrier, RegionCarrier):
                if isinstance(module, carrier):
                    unswap(module, carrier_for(module) if carrier is SiteCarrier else carrier)
            if type(module) is not kind:
                dress.callback(setattr, module, "__class__", kind)
            if SAVED in module._modules or REFLECTION in module._modules:
                dress.callback(_refill, module._modules, dict(module._modules))
                for child in (SAVED, REFLECTION):
                    module._modules.pop(child, None)
            for name in (REGION, RECORD):
                if name in vars(module):
                    dress.callback(vars(module).__setitem__, name, vars(module).pop(name))
        yield


def _refill(children: dict[str, nn.Module | None], before: dict[str, nn.Module | None]) -> None:
    """In the very order that they had, which is that of parameters and optimizer states."""
    children.clear()
    children.update(before)
