"""What version 0.5 removed, and what to write instead, as in docs/upgrading.md. Version 0.6 removes the tables.

A removed name raises `ImportError`, so that `from hra_fx import name` shows the message too: there, Python replaces an
`AttributeError` by its own error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import NoReturn, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_LOAD = "Load the base model with its own class, and call hra_fx.load_adapter(model, folder)."
_LAYOUT = "Leave it out: the base model is loaded with its own class, which knows its layout."

#: Public name, below `hra_fx`, -> what to do instead.
NAMES: dict[str, str] = {
    "AutoPeftModel": _LOAD,
    "AutoPeftModelForCausalLM": _LOAD,
    "AutoPeftModelForFeatureExtraction": _LOAD,
    "AutoPeftModelForQuestionAnswering": _LOAD,
    "AutoPeftModelForSeq2SeqLM": _LOAD,
    "AutoPeftModelForSequenceClassification": _LOAD,
    "AutoPeftModelForTokenClassification": _LOAD,
    "FoldPlan": "Call hra_fx.report for the change of each weight, and hra_fx.fold.",
    "VerificationError": "Compare the outputs with those of hra_fx.fold(copy.deepcopy(model)).",
    "accelerate_peft": "Call hra_fx.from_peft(trainer.model) after the trainer is made.",
    "combine": "Call hra_fx.set_adapter(model, [...]): active adapters act as their product, as in hra_fx.fold.",
    "delete_adapters": "Call hra_fx.delete_adapter(model, name) for each adapter.",
    "freeze": "Fold the model before torch.export: hra_fx.fold(model).",
    "get_layer_status": "Call hra_fx.report(model), or print_trainable_parameters().",
    "get_model_status": "Call hra_fx.report(model), or print_trainable_parameters().",
    "integrations.HRATrainer": "Use the Trainer of transformers, hra_fx.protect and hra_fx.orthogonality_loss, as in "
    "examples/usage/trainer.py of the repository: a model of hra_fx.transform trains in pairs by default.",
    "integrations.PairCallback": "Leave it out: a model of hra_fx.transform trains in pairs by default.",
    "integrations.ProtectCallback": "Call hra_fx.protect(model, samples) before the training.",
    "integrations.RotationCallback": "Call hra_fx.report in a callback, as in examples/usage/trainer.py.",
    "lift": "Adapt the model before torch.export: hra_fx.transform(model, config).",
    "mixed_batch": "Group the rows by adapter, and call the model once for each adapter. vLLM serves several LoRAs in "
    "one batch: write them with hra_fx.save_as_lora.",
    "plan_fold": "Call hra_fx.report for the change of each weight, and hra_fx.fold.",
    "set_adapters": "Call hra_fx.set_adapter(model, names), and hra_fx.set_scale(model, name, alpha) for each weight.",
}

#: Function or class -> its removed argument -> what to do instead.
ARGUMENTS: dict[str, dict[str, str]] = {
    "HRAConfig": {
        "trainable_token_indices": 'To train the embeddings, use modules_to_save=["embed_tokens", "lm_head"].'
    },
    "fold": {
        "adapter_names": "Call hra_fx.set_adapter(model, adapter_names) first.",
        "requantize": "Fold into the base model without quantization, or call hra_fx.save_as_lora.",
    },
    "fold_checkpoint": {
        "columns": _LAYOUT,
        "overwrite": "Delete the folder first.",
        "progress": "Leave it out: transformers shows its own progress bar.",
        "rows": _LAYOUT,
        "verify": "Leave it out.",
    },
    "merge_adapter": {"adapter_names": "Call hra_fx.set_adapter(model, adapter_names) first."},
    "protect": {
        "batches": "Pass them as `samples`.",
        "optimizer": "Leave it out: the adapters keep the directions, with any optimizer.",
    },
    "reset_adapters": {"device": "Call model.to_empty(device=...), or load the weights of the model, first."},
    "transform": {"verify": "Compare the outputs of the model with those of hra_fx.fold(copy.deepcopy(model))."},
    "visualize": {
        "heat": "Leave it out: colors show how much each weight changes. For other measures, plot "
        "hra_fx.report(model).to_dicts().",
        "theme": "Leave it out: pictures follow the reader's light or dark theme.",
    },
}

#: Command or option of `hra-fx` -> what to do instead.
COMMAND_LINE: dict[str, str] = {
    "--columns": _LAYOUT,
    "--debug": "Call the function in Python for a traceback.",
    "--overwrite": "Delete OUT first.",
    "--part": "Pass the folder of the part as BASE, such as my-pipeline/unet.",
    "--quiet": "Redirect stderr: progress bars are only shown in a terminal.",
    "--rows": _LAYOUT,
    "--verify": "Leave it out.",
    "visualize": 'Load the model in Python, and call hra_fx.visualize(model, "model.html").',
}


def raise_if_removed(name: str) -> None:
    """Raise the error of a removed public name.

    Raises:
        ImportError: the name was removed; the message says what to use instead.
    """
    if name in NAMES:
        raise ImportError(_removed(name))


def removed_method(name: str) -> Callable[..., NoReturn]:
    """A method that raises the error of the removed function with its name."""

    def method(self: object, *args: object, **kwargs: object) -> NoReturn:
        raise AttributeError(_removed(name))

    return method


def _removed(name: str) -> str:
    return f"hra_fx.{name} was removed in 0.5. {NAMES[name]}"


def without_removed_arguments(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Raise a TypeError that says what to do, if a call passes an argument of `ARGUMENTS` by name."""

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        check_arguments(function.__qualname__, kwargs)
        return function(*args, **kwargs)

    return checked


def check_arguments(function: str, given: Collection[str]) -> None:
    """Raise the error of a removed argument, if its name is given."""
    for name in ARGUMENTS[function].keys() & given:
        raise TypeError(f"{function}: `{name}` was removed in 0.5. {ARGUMENTS[function][name]}")
