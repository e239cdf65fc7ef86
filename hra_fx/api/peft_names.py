"""PEFT's names: `get_peft_model`, `PeftModel`, classes that load an adapter with its base model; and `from_peft`.

Source of the names and arguments: PEFT 0.21, `peft.mapping_func` and `peft.auto`.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from hra_fx.api.peft_model import HRAModel, as_hra_model, check_names
from hra_fx.api.peft_wrapper import hand_over
from hra_fx.config import HRAConfig
from hra_fx.errors import ConfigError
from hra_fx.hub import OPTIONS, download
from hra_fx.integrations.pretrained import root_class_for
from hra_fx.model.inject import all_or_nothing
from hra_fx.model.peft_view import take_over

#: Libraries whose classes `auto_mapping` may name.
_LIBRARIES = ("transformers", "diffusers")
_TOKENIZER = "tokenizer_config.json"

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
    """Load the base model named in an adapter's configuration, then load the adapter into it.

    `task_type` determines the class of the base model; without it, `auto_mapping` does.

    Attributes:
        task_type: the task type of the adapters that this class loads (adapters without a task type are also loaded);
            `None` for any.
        auto_class: the transformers class that loads the base model.
    """

    task_type: ClassVar[str | None] = None
    auto_class: ClassVar[str | None] = None

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
        """Load the base model and the adapter. Embeddings are resized if the folder has a tokenizer with more tokens.

        Args:
            pretrained_model_name_or_path: the folder of an adapter, or the name of a Hub repository.
            adapter_name: name of the adapter in the model.
            is_trainable: whether the adapter can be trained; otherwise the model is in eval mode.
            config: replaces the configuration in the folder.
            revision: revision of the adapter. The base model's revision is taken from the configuration.
            subfolder: path of the adapter in the folder.
            kwargs: passed to `from_pretrained` of the base model, such as `dtype`. Download options (`token`,
                `cache_dir` and others) are used for both.

        Returns:
            The adapted base model, as an `HRAModel`.

        Raises:
            ConfigError: the configuration does not name a base model, has another `task_type`, or names a class that
                is not from transformers or diffusers.
            HRAError: for other errors, see `hra_fx.load_adapter` and `from_pretrained` of the base model.
        """
        hub = {name: value for name, value in kwargs.items() if name in OPTIONS}
        if revision is not None:
            hub["revision"] = revision
        folder = pretrained_model_name_or_path
        config = HRAConfig.from_pretrained(folder, subfolder, **hub) if config is None else config
        if not config.base_model_name_or_path:
            raise ConfigError(
                f"{folder}: `base_model_name_or_path` is None, so the base model is unknown. Load the base model, and "
                "call hra_fx.load_adapter(model, folder)."
            )
        base = cls._class_for(folder, config).from_pretrained(
            config.base_model_name_or_path, revision=config.revision, **kwargs
        )
        _resize_to_tokenizer(base, folder, hub)
        return HRAModel.from_pretrained(
            base, folder, adapter_name, is_trainable, config=config, subfolder=subfolder, **hub
        )

    @classmethod
    def _class_for(cls, folder: str | os.PathLike[str], config: HRAConfig) -> Any:
        if cls.task_type and config.task_type and cls.task_type != config.task_type:
            raise ConfigError(
                f"{folder}: {cls.__name__} loads adapters with task_type={cls.task_type!r}, got {config.task_type!r}. "
                f"Use {_BY_TASK[config.task_type].__name__}."
            )
        name = cls.auto_class or (_BY_TASK[config.task_type].auto_class if config.task_type else None)
        if name is not None:
            return getattr(importlib.import_module("transformers"), name)
        mapping = config.auto_mapping or {}
        library, kind = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
        if library.partition(".")[0] not in _LIBRARIES:
            raise ConfigError(
                f"{folder}: `auto_mapping` must name a class of {' or '.join(_LIBRARIES)}, got {config.auto_mapping}. "
                "Load the base model, and call hra_fx.load_adapter(model, folder)."
            )
        return getattr(importlib.import_module(library), kind)


# Class statements, because type checkers do not accept variables in annotations or as base classes.
class AutoPeftModelForCausalLM(AutoPeftModel):
    """`AutoPeftModel` for language models."""

    task_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """`AutoPeftModel` for sequence-to-sequence models."""

    task_type = "SEQ_2_SEQ_LM"
    auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """`AutoPeftModel` for text classification."""

    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """`AutoPeftModel` for token classification."""

    task_type = "TOKEN_CLS"
    auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """`AutoPeftModel` for extractive question answering."""

    task_type = "QUESTION_ANS"
    auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """`AutoPeftModel` for models without a head."""

    task_type = "FEATURE_EXTRACTION"
    auto_class = "AutoModel"


_BY_TASK: dict[str | None, type[AutoPeftModel]] = {kind.task_type: kind for kind in AutoPeftModel.__subclasses__()}


def _resize_to_tokenizer(model: Any, folder: str | os.PathLike[str], hub: dict[str, Any]) -> None:
    """Resize the embeddings if a tokenizer with more tokens was saved with the adapter, as PEFT does."""
    local = Path(folder) if os.path.isdir(folder) else download(folder, [_TOKENIZER], hub)
    if not (local / _TOKENIZER).is_file() or not hasattr(model, "get_input_embeddings"):
        return
    options = {name: value for name, value in hub.items() if name != "max_workers"}
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder, **options)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


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
