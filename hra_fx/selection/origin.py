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


#: PEFT's default targets -> the model types that have them.
_TYPES: Mapping[tuple[str, ...] | str, str] = {
    ("q_proj", "v_proj"): "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 "
    "stablelm",
    ("query", "value"): "bert electra layoutlm roberta xlm-roberta",
    ("query_key_value",): "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("c_proj", "c_attn"): "btlm",
    ("qkv_proj",): "codegen",
    ("in_proj",): "deberta",
    ("query_proj", "value_proj"): "deberta-v2",
    r".*language_model\..*\.(q_proj|v_proj)": "gemma4",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("Wqkv",): "mpt",
    ("q", "v"): "mt5 t5",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}
DEFAULT_TARGETS = {kind: targets for targets, kinds in _TYPES.items() for kind in kinds.split()}
