"""hra_fx: Householder reflection adaptation (HRA, https://arxiv.org/abs/2405.17484) as a `torch.fx` compiler pass.

    model = hra_fx.transform(model, hra_fx.HRAConfig(r=8, target_modules=["q_proj", "v_proj"]))
    ...                                  # train as usual: only the adapters are trainable
    print(hra_fx.report(model))          # the adapted layers and how much each one changed
    model = hra_fx.fold(model)           # a plain base model with the adapters in its weights

Names are imported when they are first used, so importing the package is fast, and any submodule can be imported first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hra_fx import errors, removed
from hra_fx.errors import *  # noqa: F403
from hra_fx.version import VERSION

if TYPE_CHECKING:
    from hra_fx.api.fold_checkpoint import fold_checkpoint as fold_checkpoint
    from hra_fx.api.from_peft import from_peft as from_peft
    from hra_fx.api.load import load_adapter as load_adapter
    from hra_fx.api.peft_model import (
        HRAModel as HRAModel,
        PeftModel as PeftModel,
        get_peft_model as get_peft_model,
    )
    from hra_fx.api.pretrained import push_to_hub as push_to_hub
    from hra_fx.api.transform import transform as transform
    from hra_fx.checkpoint.saving import (
        get_peft_model_state_dict as get_peft_model_state_dict,
        save_adapter as save_adapter,
    )
    from hra_fx.config import HRAConfig as HRAConfig
    from hra_fx.export.onnx_swap import adapter_inputs as adapter_inputs, make_swappable as make_swappable
    from hra_fx.export.training_step import export_training_step as export_training_step
    from hra_fx.layers.weight import effective_weight as effective_weight
    from hra_fx.lora.save import (
        LoraResult as LoraResult,
        convert_to_lora as convert_to_lora,
        save_as_lora as save_as_lora,
    )
    from hra_fx.model.fold import fold as fold
    from hra_fx.model.graphs import graphs as graphs
    from hra_fx.model.merge import merge_adapter as merge_adapter, unmerge_adapter as unmerge_adapter
    from hra_fx.model.orthogonality import orthogonality_loss as orthogonality_loss
    from hra_fx.model.remove import delete_adapter as delete_adapter
    from hra_fx.model.reset import reset_adapters as reset_adapters
    from hra_fx.model.setup import add_adapter as add_adapter
    from hra_fx.model.switch import (
        disable_adapters as disable_adapters,
        set_adapter as set_adapter,
        set_scale as set_scale,
    )
    from hra_fx.reporting.report import Report as Report, report as report
    from hra_fx.training.distance import (
        add_distance_to_base as add_distance_to_base,
        distance_to_base as distance_to_base,
    )
    from hra_fx.training.own_texts import own_texts as own_texts
    from hra_fx.training.protect import Protection as Protection, protect as protect, unprotect as unprotect
    from hra_fx.view.network import to_networkx as to_networkx
    from hra_fx.view.picture import visualize as visualize

__version__ = VERSION

#: Module -> the public names that are imported from it; the same as the block above, which type checkers read.
_NAMES = {
    "api.fold_checkpoint": ("fold_checkpoint",),
    "api.from_peft": ("from_peft",),
    "api.load": ("load_adapter",),
    "api.peft_model": ("HRAModel", "PeftModel", "get_peft_model"),
    "api.transform": ("transform",),
    "checkpoint.saving": ("get_peft_model_state_dict", "save_adapter"),
    "config": ("HRAConfig",),
    "export.onnx_swap": ("adapter_inputs", "make_swappable"),
    "export.training_step": ("export_training_step",),
    "api.pretrained": ("push_to_hub",),
    "layers.weight": ("effective_weight",),
    "lora.save": ("LoraResult", "convert_to_lora", "save_as_lora"),
    "model.fold": ("fold",),
    "model.graphs": ("graphs",),
    "model.remove": ("delete_adapter",),
    "model.merge": ("merge_adapter", "unmerge_adapter"),
    "model.orthogonality": ("orthogonality_loss",),
    "model.reset": ("reset_adapters",),
    "model.setup": ("add_adapter",),
    "model.switch": ("disable_adapters", "set_adapter", "set_scale"),
    "reporting.report": ("Report", "report"),
    "training.distance": ("add_distance_to_base", "distance_to_base"),
    "training.own_texts": ("own_texts",),
    "training.protect": ("Protection", "protect", "unprotect"),
    "view.network": ("to_networkx",),
    "view.picture": ("visualize",),
}
#: Public name -> the module that it is imported from.
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted({*_HOMES, *errors.__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        if name in removed.NAMES:  # an AttributeError of `from hra_fx import name` would not show the message
            raise ImportError(removed.message(name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
