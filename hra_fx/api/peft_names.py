"""PEFT's names: `get_peft_model`, `PeftModel`, classes that load an adapter with its base model; and `from_peft`.

Source of the names and arguments: PEFT 0.21, `peft.mapping_func` and `peft.auto`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from hra_fx.api.peft_model import HRAModel, as_hra_model, check_names
from hra_fx.api.peft_wrapper import hand_over
from hra_fx.config import HRAConfig
from hra_fx.errors import ConfigError
from hra_fx.hub import OPTIONS
from hra_fx.integrations.pretrained import root_class_for
from hra_fx.model.inject import all_or_nothing
from hra_fx.model.peft_view import take_over

#: Libraries whose classes `auto_mapping` may name.
_LIBRARIES = ("transformers", "diffusers")
#: Task type -> end of the name of transformers' class for it.
_AUTO: Mapping[str | None, str] = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "",
}

#: PEFT's name for the class whose `from_pretrained` loads an adapter into a base model.
PeftModel = HRAModel


def get_peft_model(
    model: nn.Module,
    peft_config: HRAConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Adapt a model and add PEFT's methods, like `HRAModel`, with the arguments of `peft.get_peft_model`.

    Args:
        model: any module that `hra_fx.transform` accepts, changed in place.
        peft_config: an `hra_fx.HRAConfig` or a `peft.HRAConfig`.
        adapter_name: name of the adapter.
        mixed, autocast_adapter_dtype: ignored, because all adapters are HRA and vectors are always at least float32.
        revision: revision of the base model, written into the configuration.
        low_cpu_mem_usage: create the vectors on the meta device, to be loaded later.

    Returns:
        `model`, with PEFT's methods.

    Raises:
        HRAError: see `HRAModel`.

    Example:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 12 || all params: 40 || trainable%: 30.0000
    """
    adapted = HRAModel(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    if revision is not None:
        adapted.peft_config[adapter_name].revision = revision
    return adapted


class AutoPeftModel:
    """Load the base model that an adapter names, then load the adapter into it."""

    task_type: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: HRAConfig | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load the base model and the adapter.

        The arguments are those of `hra_fx.load_adapter`; others, such as `dtype`, are passed to `from_pretrained` of
        the base model. Download options (`token`, `cache_dir` and others) are used for both.

        Returns:
            The adapted base model, as an `HRAModel`.

        Raises:
            ConfigError: the configuration names no base model, no class of transformers or diffusers, or has another
                `task_type`.
        """
        folder, hub = pretrained_model_name_or_path, {name: kwargs[name] for name in kwargs.keys() & set(OPTIONS)}
        hub |= {} if revision is None else {"revision": revision}
        config = HRAConfig.from_pretrained(folder, subfolder, **hub) if config is None else config
        path, task, mapping = config.base_model_name_or_path, config.task_type, config.auto_mapping or {}
        library, name = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
        if task or cls.task_type:
            library, name = "transformers", f"AutoModel{_AUTO[task or cls.task_type]}"
        if not path or library.partition(".")[0] not in _LIBRARIES or (task and cls.task_type not in (None, task)):
            raise ConfigError(
                f"{folder}: {cls.__name__} cannot load its base model {path!r}, with task_type={task!r} and "
                f"auto_mapping={config.auto_mapping}. Load it with its own class, and call "
                "hra_fx.load_adapter(model, folder)."
            )
        loader = getattr(importlib.import_module(library), name)
        base = loader.from_pretrained(path, revision=config.revision, **kwargs)
        options = {"config": config, "subfolder": subfolder, **hub}
        return HRAModel.from_pretrained(base, folder, adapter_name, is_trainable, **options)


def _auto(name: str, task_type: str) -> type[AutoPeftModel]:
    """The subclass for one task type."""
    doc = f"`AutoPeftModel` for adapters with `task_type={task_type!r}`."
    return type(name, (AutoPeftModel,), {"__doc__": doc, "__module__": __name__, "task_type": task_type})


AutoPeftModelForCausalLM = _auto("AutoPeftModelForCausalLM", "CAUSAL_LM")
AutoPeftModelForSeq2SeqLM = _auto("AutoPeftModelForSeq2SeqLM", "SEQ_2_SEQ_LM")
AutoPeftModelForSequenceClassification = _auto("AutoPeftModelForSequenceClassification", "SEQ_CLS")
AutoPeftModelForTokenClassification = _auto("AutoPeftModelForTokenClassification", "TOKEN_CLS")
AutoPeftModelForQuestionAnswering = _auto("AutoPeftModelForQuestionAnswering", "QUESTION_ANS")
AutoPeftModelForFeatureExtraction = _auto("AutoPeftModelForFeatureExtraction", "FEATURE_EXTRACTION")


def from_peft(model: nn.Module) -> Any:
    """Convert a model with PEFT's HRA layers to hra_fx in place, with the same adapters.

    PEFT's layers are replaced by those of hra_fx. All adapters keep their vectors, trained modules and biases, and
    their state: which are active (and in which order), which are trainable, and whether they are disabled. Vectors and
    trained modules remain the same parameters. Biases become copies: with `bias`, create the optimizer after this call.

    `report`, `fold`, `save_as_lora`, `save_adapter` and `visualize` also take a model of PEFT as it is.

    Args:
        model: a `peft.PeftModel`, a module that contains one, or a model that PEFT has added layers to (`add_adapter`
            of transformers). The methods of the `PeftModel` are afterwards those of the base model, so a Trainer that
            holds it saves and resumes the adapters.

    Returns:
        The base model, as an `HRAModel`.

    Raises:
        AdapterError: the model has no HRA layers of PEFT, has layers of other PEFT methods, or has merged adapters.
        HRAError: for other errors, see `hra_fx.transform`. After any error the model is unchanged.

    Example:
        >>> import peft, torch
        >>> wrapped = peft.get_peft_model(
        ...     nn.Sequential(nn.Linear(6, 4)), peft.HRAConfig(r=2, target_modules=["0"], init_weights=False)
        ... )
        >>> x = torch.ones(3, 6)
        >>> wanted = wrapped(x)
        >>> bool(torch.allclose(from_peft(wrapped)(x), wanted, atol=1e-6))
        True
    """
    with all_or_nothing() as undo:
        root = take_over(model, undo, root_class_for)
        check_names(root)
        hand_over(model, root, undo)
    return as_hra_model(root)
