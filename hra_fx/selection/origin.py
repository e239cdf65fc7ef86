"""Facts about a model that a graph of it keeps, and the default targets of its model type.

`target_modules="all-linear"`, the defaults and adapter files depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from hra_fx.compat import KEPT_ATTRIBUTES, loaded_class
from hra_fx.layers.class_swap import original_class

_KEY = "_hra_origin"


class GraphPart(nn.Module):
    """A module that a graph has but its model does not. Configurations do not select it."""

    #: Keeps a call in `graph.eliminate_dead_code()`, also if its result is not used.
    _is_impure = True


@dataclass(frozen=True)
class Origin:
    """The facts about a model.

    Attributes:
        class_name, library: the name of its class, and the module that defines the class.
        is_pretrained: whether it is a transformers model.
        name: its name or folder, or `None`.
        model_type: that of its configuration, or `None`.
        output: the path of its output layer, or `None`.
    """

    class_name: str
    library: str
    is_pretrained: bool
    name: str | None
    model_type: str | None
    output: str | None


def origin_of(model: nn.Module) -> Origin:
    """The facts about a model, or about the model that a graph was traced from."""
    if isinstance(known := vars(model).get(_KEY), Origin):
        return known
    cls, name = original_class(model), getattr(model, "name_or_path", None)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    is_pretrained = isinstance(model, loaded_class("transformers.modeling_utils", "PreTrainedModel"))
    head = getattr(model, "get_output_embeddings")() if is_pretrained else None  # noqa: B009  (typed as a tensor)
    output = None if head is None else next((path for path, part in model.named_modules() if part is head), None)
    name, model_type = (text if isinstance(text, str) else None for text in (name, model_type))
    return Origin(cls.__name__, cls.__module__, is_pretrained, name, model_type, output)


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
