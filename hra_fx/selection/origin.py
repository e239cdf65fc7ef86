"""The origin of a model: its class, name, configuration and output layer, and the default targets of its model type.

A graph stores these facts about the model that it was traced from, because a `GraphModule` has another class and does
not have these attributes. `target_modules="all-linear"`, the defaults of a model type and adapter files depend on them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from hra_fx.compat import KEPT_ATTRIBUTES
from hra_fx.layers.class_swap import original_class

_KEY = "_hra_origin"


@dataclass(frozen=True)
class Origin:
    """The facts about a model.

    Attributes:
        class_name, library: the name of its class, and the module that defines the class.
        is_pretrained: whether it is a transformers model.
        name: its name or folder.
        config: its configuration, or `None`.
        output: the path of its output layer, or `None`.
    """

    class_name: str
    library: str
    is_pretrained: bool = False
    name: str | None = None
    config: Any = None
    output: str | None = None


def origin_of(model: nn.Module) -> Origin:
    """The facts about a model, or about the model that a graph was traced from."""
    if isinstance(model, fx.GraphModule):
        known = vars(model).get(_KEY)
        if isinstance(known, Origin):
            return known
    cls, name = original_class(model), getattr(model, "name_or_path", None)
    # If transformers is not loaded, no object has its classes.
    pretrained = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    is_pretrained = pretrained is not None and isinstance(model, pretrained)
    head = getattr(model, "get_output_embeddings")() if is_pretrained else None  # noqa: B009  (typed as a tensor)
    output = None if head is None else next((path for path, part in model.named_modules() if part is head), None)
    return Origin(
        cls.__name__,
        cls.__module__,
        is_pretrained,
        name if isinstance(name, str) else None,
        getattr(model, "config", None),
        output,
    )


def keep_origin(graph: fx.GraphModule, origin: Origin) -> None:
    """Record the facts about the model of a graph."""
    vars(graph)[_KEY] = origin  # a pickle keeps attributes
    graph.meta.setdefault(KEPT_ATTRIBUTES, {})[_KEY] = origin  # and a deepcopy sets the attributes in this entry


_QV = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")
_FUSED = ("query_key_value",)

DEFAULT_TARGETS: Mapping[str, tuple[str, ...] | str] = {
    "RefinedWeb": _FUSED,
    "RefinedWebModel": _FUSED,
    "bart": _QV,
    "bert": _QUERY_VALUE,
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "bloom": _FUSED,
    "btlm": ("c_proj", "c_attn"),
    "chatglm": _FUSED,
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "electra": _QUERY_VALUE,
    "falcon": _FUSED,
    "gemma": _QV,
    "gemma2": _QV,
    "gemma3_text": _QV,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": _QV,
    "gpt_neox": _FUSED,
    "gptj": _QV,
    "layoutlm": _QUERY_VALUE,
    "llama": _QV,
    "llama4": _QV,
    "mistral": _QV,
    "mixtral": _QV,
    "mpt": ("Wqkv",),
    "mt5": ("q", "v"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "opt": _QV,
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "qwen2": _QV,
    "qwen3": _QV,
    "roberta": _QUERY_VALUE,
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
    "stablelm": _QV,
    "t5": ("q", "v"),
    "xlm-roberta": _QUERY_VALUE,
}
