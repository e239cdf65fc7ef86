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
    from hra_fx.adapters.adding import add_adapter as add_adapter
    from hra_fx.adapters.combining import combine as combine
    from hra_fx.adapters.deleting import delete_adapter as delete_adapter
    from hra_fx.adapters.merging import merge_adapter as merge_adapter, unmerge_adapter as unmerge_adapter
    from hra_fx.adapters.scaling import set_scale as set_scale
    from hra_fx.adapters.switching import disable_adapters as disable_adapters, set_adapter as set_adapter
    from hra_fx.checkpoint.disk.folding import (
        fold_checkpoint as fold_checkpoint,
        unfold_checkpoint as unfold_checkpoint,
    )
    from hra_fx.checkpoint.loading import load_adapter as load_adapter
    from hra_fx.checkpoint.saving import save_adapter as save_adapter
    from hra_fx.config import HRAConfig as HRAConfig
    from hra_fx.errors import (
        AdapterError as AdapterError,
        CaptureError as CaptureError,
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        FoldError as FoldError,
        GraphInvariantError as GraphInvariantError,
        HRAError as HRAError,
        HRAWarning as HRAWarning,
        SelectionError as SelectionError,
        UnsupportedLayerError as UnsupportedLayerError,
        VisualizeError as VisualizeError,
    )
    from hra_fx.exported.freezing import freeze as freeze
    from hra_fx.exported.lowering import lower as lower
    from hra_fx.exported.swapping import adapter_inputs as adapter_inputs, make_swappable as make_swappable
    from hra_fx.folding import fold as fold, plan_fold as plan_fold
    from hra_fx.graphing import graphs as graphs
    from hra_fx.model import HRAModel as HRAModel
    from hra_fx.orthogonality import orthogonality_loss as orthogonality_loss
    from hra_fx.reporting import report as report
    from hra_fx.transforming import transform as transform
    from hra_fx.view import visualize as visualize
    from hra_fx.view.network import to_networkx as to_networkx

__version__ = "0.1.0"

_HOMES = {
    "HRAConfig": "config",
    "HRAModel": "model",
    "adapter_inputs": "exported.swapping",
    "add_adapter": "adapters.adding",
    "combine": "adapters.combining",
    "delete_adapter": "adapters.deleting",
    "disable_adapters": "adapters.switching",
    "fold": "folding",
    "fold_checkpoint": "checkpoint.disk.folding",
    "freeze": "exported.freezing",
    "graphs": "graphing",
    "load_adapter": "checkpoint.loading",
    "lower": "exported.lowering",
    "make_swappable": "exported.swapping",
    "merge_adapter": "adapters.merging",
    "orthogonality_loss": "orthogonality",
    "plan_fold": "folding",
    "report": "reporting",
    "save_adapter": "checkpoint.saving",
    "set_adapter": "adapters.switching",
    "set_scale": "adapters.scaling",
    "to_networkx": "view.network",
    "transform": "transforming",
    "unfold_checkpoint": "checkpoint.disk.folding",
    "unmerge_adapter": "adapters.merging",
    "visualize": "view",
    **dict.fromkeys(
        (
            "AdapterError",
            "CaptureError",
            "CheckpointError",
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
