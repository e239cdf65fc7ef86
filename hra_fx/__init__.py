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

from hra_fx import errors
from hra_fx.errors import (
    AdapterError as AdapterError,
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    FoldError as FoldError,
    GraphInvariantError as GraphInvariantError,
    HRAError as HRAError,
    HRAWarning as HRAWarning,
    SelectionError as SelectionError,
    UnsupportedLayerError as UnsupportedLayerError,
    VerificationError as VerificationError,
    VisualizeError as VisualizeError,
)
from hra_fx.version import VERSION

if TYPE_CHECKING:
    from hra_fx.api.fold import fold as fold
    from hra_fx.api.from_peft import from_peft as from_peft
    from hra_fx.api.graphs import graphs as graphs
    from hra_fx.api.load import load_adapter as load_adapter
    from hra_fx.api.peft_model import HRAModel as HRAModel
    from hra_fx.api.peft_names import (
        AutoPeftModel as AutoPeftModel,
        AutoPeftModelForCausalLM as AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
        PeftModel as PeftModel,
        get_peft_model as get_peft_model,
    )
    from hra_fx.api.status import get_layer_status as get_layer_status, get_model_status as get_model_status
    from hra_fx.api.transform import transform as transform
    from hra_fx.checkpoint.disk.fold import (
        fold_checkpoint as fold_checkpoint,
        unfold_checkpoint as unfold_checkpoint,
    )
    from hra_fx.checkpoint.saving import (
        get_peft_model_state_dict as get_peft_model_state_dict,
        save_adapter as save_adapter,
    )
    from hra_fx.config import HRAConfig as HRAConfig
    from hra_fx.export.lift import lift as lift
    from hra_fx.export.lower import freeze as freeze, lower as lower
    from hra_fx.export.onnx_swap import adapter_inputs as adapter_inputs, make_swappable as make_swappable
    from hra_fx.export.training_step import export_training_step as export_training_step
    from hra_fx.integrations.peft_acceleration import accelerate_peft as accelerate_peft
    from hra_fx.integrations.push import push_to_hub as push_to_hub
    from hra_fx.lora.save import (
        LoraResult as LoraResult,
        convert_to_lora as convert_to_lora,
        save_as_lora as save_as_lora,
    )
    from hra_fx.model.add import add_adapter as add_adapter
    from hra_fx.model.combine import combine as combine
    from hra_fx.model.delete import delete_adapter as delete_adapter
    from hra_fx.model.fold import FoldPlan as FoldPlan, plan_fold as plan_fold
    from hra_fx.model.merge import merge_adapter as merge_adapter, unmerge_adapter as unmerge_adapter
    from hra_fx.model.mixed import mixed_batch as mixed_batch
    from hra_fx.model.orthogonality import orthogonality_loss as orthogonality_loss
    from hra_fx.model.pairs import train_pairs as train_pairs
    from hra_fx.model.reset import reset_adapters as reset_adapters
    from hra_fx.model.scale import set_scale as set_scale
    from hra_fx.model.switch import disable_adapters as disable_adapters, set_adapter as set_adapter
    from hra_fx.reporting.report import Report as Report, report as report
    from hra_fx.view.network import to_networkx as to_networkx
    from hra_fx.view.picture import visualize as visualize

__version__ = VERSION

#: Public name -> the module that it is imported from; the same as the block above, which type checkers read.
_HOMES = {
    "AutoPeftModel": "api.peft_names",
    "AutoPeftModelForCausalLM": "api.peft_names",
    "AutoPeftModelForFeatureExtraction": "api.peft_names",
    "AutoPeftModelForQuestionAnswering": "api.peft_names",
    "AutoPeftModelForSeq2SeqLM": "api.peft_names",
    "AutoPeftModelForSequenceClassification": "api.peft_names",
    "AutoPeftModelForTokenClassification": "api.peft_names",
    "FoldPlan": "model.fold",
    "HRAConfig": "config",
    "HRAModel": "api.peft_model",
    "LoraResult": "lora.save",
    "PeftModel": "api.peft_names",
    "Report": "reporting.report",
    "accelerate_peft": "integrations.peft_acceleration",
    "adapter_inputs": "export.onnx_swap",
    "add_adapter": "model.add",
    "combine": "model.combine",
    "convert_to_lora": "lora.save",
    "delete_adapter": "model.delete",
    "disable_adapters": "model.switch",
    "export_training_step": "export.training_step",
    "fold": "api.fold",
    "fold_checkpoint": "checkpoint.disk.fold",
    "freeze": "export.lower",
    "from_peft": "api.from_peft",
    "get_layer_status": "api.status",
    "get_model_status": "api.status",
    "get_peft_model": "api.peft_names",
    "get_peft_model_state_dict": "checkpoint.saving",
    "graphs": "api.graphs",
    "lift": "export.lift",
    "load_adapter": "api.load",
    "lower": "export.lower",
    "make_swappable": "export.onnx_swap",
    "merge_adapter": "model.merge",
    "mixed_batch": "model.mixed",
    "orthogonality_loss": "model.orthogonality",
    "plan_fold": "model.fold",
    "push_to_hub": "integrations.push",
    "report": "reporting.report",
    "reset_adapters": "model.reset",
    "save_adapter": "checkpoint.saving",
    "save_as_lora": "lora.save",
    "set_adapter": "model.switch",
    "set_scale": "model.scale",
    "to_networkx": "view.network",
    "train_pairs": "model.pairs",
    "transform": "api.transform",
    "unfold_checkpoint": "checkpoint.disk.fold",
    "unmerge_adapter": "model.merge",
    "visualize": "view.picture",
}

__all__ = sorted({*_HOMES, *errors.__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
