"""hra_fx: Householder reflection adaptation (HRA, https://arxiv.org/abs/2405.17484) as a `torch.fx` compiler pass.

    model = hra_fx.transform(model, hra_fx.HRAConfig(r=8, target_modules=["q_proj", "v_proj"]))
    ...                                  # train as ever: only the reflections have gradients
    print(hra_fx.report(model))          # where they are, and how far each turned its layer
    model = hra_fx.fold(model)           # the base model again, node for node and key for key

Names load on first use, so that importing the package costs nothing and any submodule may be imported first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hra_fx.config import HRAConfig as HRAConfig
    from hra_fx.errors import (
        AdapterError as AdapterError,
        CaptureError as CaptureError,
        ConfigError as ConfigError,
        FoldError as FoldError,
        GraphInvariantError as GraphInvariantError,
        HRAError as HRAError,
        HRAWarning as HRAWarning,
        SelectionError as SelectionError,
        UnsupportedLayerError as UnsupportedLayerError,
        VisualizeError as VisualizeError,
    )
    from hra_fx.folding import fold as fold, plan_fold as plan_fold
    from hra_fx.graphing import graphs as graphs
    from hra_fx.reporting import report as report
    from hra_fx.transforming import transform as transform
    from hra_fx.view import visualize as visualize

__version__ = "0.1.0"

_HOMES = {
    "HRAConfig": "config",
    "fold": "folding",
    "graphs": "graphing",
    "plan_fold": "folding",
    "report": "reporting",
    "transform": "transforming",
    "visualize": "view",
    **dict.fromkeys(
        (
            "AdapterError",
            "CaptureError",
            "ConfigError",
            "FoldError",
            "GraphInvariantError",
            "HRAError",
            "HRAWarning",
            "SelectionError",
            "UnsupportedLayerError",
            "VisualizeError",
        ),
        "errors",
    ),
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
