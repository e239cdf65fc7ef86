"""PEFT's names: `get_peft_model`, `PeftModel`, classes that load an adapter with its base model; and `from_peft`.

Source of the names and arguments: PEFT 0.21, `peft.mapping_func` and `peft.auto`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hra_fx.api.peft_model import HRAModel, as_hra_model, check_names
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError, ConfigError
from hra_fx.hub import OPTIONS, download
from hra_fx.integrations.pretrained import root_class_for
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters
from hra_fx.layers.peft_layers import is_peft_hra_layer, is_peft_layer
from hra_fx.layers.trained_copies import own_tensors
from hra_fx.model.inject import remove_adapters
from hra_fx.model.setup import add_filled_adapter, checked, set_up
from hra_fx.model.state import collect_parts, get_state
from hra_fx.model.switch import disable_adapters, set_adapter
from hra_fx.model.trainable import set_requires_grad
from hra_fx.selection.select import select, without_unmatched

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
    their state: which are active (and in which order), which are trainable, and whether they are disabled. The vectors
    keep their memory but become new parameters, so create the optimizer after this call.

    Args:
        model: a `peft.PeftModel`, or a model that PEFT has added layers to (`add_adapter` of transformers). Do not use
            the `PeftModel` afterwards.

    Returns:
        The base model, as an `HRAModel`.

    Raises:
        AdapterError: the model has no HRA layers of PEFT, has layers of other PEFT methods, or has merged adapters.
        HRAError: for other errors, see `hra_fx.transform`. After any error the model is unchanged.

    Example:
        >>> import peft
        >>> wrapped = peft.get_peft_model(
        ...     nn.Sequential(nn.Linear(6, 4)), peft.HRAConfig(r=2, target_modules=["0"], init_weights=False)
        ... )
        >>> x = torch.ones(3, 6)
        >>> wanted = wrapped(x)
        >>> bool(torch.allclose(from_peft(wrapped)(x), wanted, atol=1e-6))
        True
    """
    get_base: Any = getattr(model, "get_base_model", None)
    base = get_base() if callable(get_base) else model
    if not isinstance(base, nn.Module):
        raise AdapterError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    root: Any = base
    layers: dict[str, Any] = {path: part for path, part in root.named_modules() if is_peft_layer(part)}
    _check(root, layers)
    wrappers: dict[str, Any] = {
        path: part for path, part in root.named_modules() if {"original_module", "modules_to_save"} <= {*part._modules}
    }
    configs = {name: checked(root, config, name) for name, config in root.peft_config.items()}
    vectors: dict[str, dict[str, Tensor]] = {
        name: {path: layer.hra_u[name] for path, layer in layers.items() if name in layer.hra_u} for name in configs
    }
    trained = {name: any(u.requires_grad for u in held.values()) for name, held in vectors.items()}
    first = next(iter(layers.values()))
    active, disabled = tuple(name for name in first.active_adapters if name in configs), first.disable_adapters
    with torch.inference_mode(False), ExitStack() as undo:
        _take_out(root, layers.values(), wrappers.values(), undo)
        check_names(root)
        undo.callback(_remove_all, root)
        for name, config in configs.items():
            _add(root, name, config, vectors[name], _trained_tensors(wrappers, name))
        set_adapter(root, active)
        set_requires_grad(collect_parts(root), trained)
        if disabled:
            disable_adapters(root)
        undo.pop_all()
    return as_hra_model(root)


def _check(root: nn.Module, layers: Mapping[str, Any]) -> None:
    if get_state(root):
        raise AdapterError(
            f"{type(root).__name__} already has hra_fx adapters. Only models without them can be converted."
        )
    if not layers:
        raise AdapterError(
            f"{type(root).__name__} has no PEFT adapters. To add one of hra_fx, call hra_fx.transform(model, config)."
        )
    for path, layer in layers.items():
        if not is_peft_hra_layer(layer):
            raise AdapterError(
                f"{path}: this layer is from another PEFT method ({type(layer).__name__}). Only HRA can be converted. "
                "Call `merge_and_unload()` or `unload()` on the PEFT model, then hra_fx.transform."
            )
        if layer.merged_adapters:
            raise AdapterError(
                f"{path}: adapters {list(layer.merged_adapters)} are merged. First call unmerge_adapter() on the PEFT "
                "model."
            )


def _trained_tensors(wrappers: Mapping[str, Any], name: str) -> dict[tuple[str, str], Tensor]:
    """(path of the module, name of its tensor) -> the tensor in an adapter's copies of `modules_to_save`."""
    return {
        (f"{path}.{below}".rstrip("."), entry): getattr(owner, entry)
        for path, wrapper in wrappers.items()
        if name in wrapper.modules_to_save
        for below, owner in wrapper.modules_to_save[name].named_modules()
        for entry in own_tensors(owner)
    }


def _take_out(root: nn.Module, layers: Iterable[Any], wrappers: Iterable[Any], undo: ExitStack) -> None:
    """Replace PEFT's modules with those of the base model."""
    replaced = {layer: layer.base_layer for layer in layers} | {one: one.original_module for one in wrappers}
    for parent in [module for module in root.modules() if module not in replaced]:
        for name, child in parent._modules.items():
            if child in replaced:
                undo.callback(setattr, parent, name, child)
                setattr(parent, name, replaced[child])
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(root):
            undo.callback(vars(root).__setitem__, name, vars(root).pop(name))


def _add(
    root: nn.Module,
    name: str,
    config: HRAConfig,
    vectors: Mapping[str, Tensor],
    copies: Mapping[tuple[str, str], Tensor],
) -> None:
    """Add an adapter with the vectors of its layers, by path, and the tensors that it trains in modules."""
    config = without_unmatched(root, config)
    if odd := sorted(select(root, config).keys() ^ vectors.keys()):
        raise AdapterError(
            f"adapter {name!r}: {odd[0]} does not match the adapter's configuration, which was changed in PEFT."
        )

    def fill(path: str, layer: nn.Module, reflection: HouseholderAdapters) -> None:
        spec = AdapterSpec(vectors[path].shape[1], config.apply_GS, init_weights=False)
        reflection.put(name, spec, vectors[path].detach(), None)

    state = get_state(root)
    if state is None:
        set_up(root, config, name, fill, copies, root_class=root_class_for(root))
    else:
        add_filled_adapter(root, state, name, config, fill, copies)


def _remove_all(root: nn.Module) -> None:
    if state := get_state(root):
        remove_adapters(root, state, tuple(state.configs))
