"""Where llama.cpp keeps the weights of a transformers model: its architecture, tensor names and order of rows.

Sources, in https://github.com/ggml-org/llama.cpp: the scripts in `conversion/` that write its model files, and
`src/llama-adapter.cpp`, which reads adapters. It refuses an adapter of another architecture, and one with a tensor that
the model file does not have, so that what it would refuse is refused here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from hra_fx.errors import AdapterError, UnsupportedLayerError
from hra_fx.lora.adapter import LoraAdapter, LoraLayer

#: From a module's path to the name of its tensor without ".weight"; `None` if llama.cpp has no such tensor.
TensorNames: TypeAlias = Callable[[str], str | None]


class Architecture(NamedTuple):
    """What llama.cpp makes of a model type of transformers.

    Attributes:
        name: llama.cpp's name.
        rotates_pairs: whether its rotary embedding rotates rows `2i` and `2i + 1` of a head, where transformers
            rotates rows `i` and `i + head_dim / 2`. Its model files then have the rows of queries and keys reordered.
        ties: whether the output layer is tied to the embeddings where the configuration does not say it.
    """

    name: str
    rotates_pairs: bool = False
    ties: bool = False


ARCHITECTURES = {
    "gemma": Architecture("gemma", ties=True),
    "gemma2": Architecture("gemma2", ties=True),
    "gemma3": Architecture("gemma3", ties=True),
    "gemma3_text": Architecture("gemma3", ties=True),
    "gpt2": Architecture("gpt2", ties=True),
    "granite": Architecture("granite", rotates_pairs=True),
    "llama": Architecture("llama", rotates_pairs=True),
    "mistral": Architecture("llama", rotates_pairs=True),
    "olmo2": Architecture("olmo2"),
    "phi": Architecture("phi2"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", rotates_pairs=True, ties=True),
    "starcoder2": Architecture("starcoder2", ties=True),
}
#: What to do about an adapter that llama.cpp cannot load.
INSTEAD = "Fold the model instead (hra_fx.fold), and convert the folded model with llama.cpp"
_LEAVE_OUT = f"{INSTEAD}; or leave the layer out with exclude_modules."
_QUERIES_AND_KEYS = (".q_proj", ".k_proj")


def find_architecture(adapter: LoraAdapter) -> Architecture:
    """The architecture of the base model.

    Raises:
        AdapterError: the model type is unknown or not supported. The message lists those that are.

    >>> find_architecture(LoraAdapter((), model_config={"model_type": "mistral"})).name
    'llama'
    """
    model_type = adapter.model_config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise AdapterError(
            f"GGUF adapters can be written for the model types {', '.join(ARCHITECTURES)}, got {model_type!r}. "
            f"{INSTEAD}."
        )
    if text_config(adapter).get("use_bidirectional_attention"):
        raise AdapterError(
            f"`use_bidirectional_attention` is True: llama.cpp has another architecture for such a {model_type}, for "
            f"which GGUF adapters cannot be written. {INSTEAD}."
        )
    return ARCHITECTURES[model_type]


def is_tied(adapter: LoraAdapter) -> bool:
    """Whether the output layer of the base model is tied to its embeddings, so that llama.cpp has no weight for it."""
    given = text_config(adapter).get("tie_word_embeddings")
    known = ARCHITECTURES.get(str(adapter.model_config.get("model_type")))
    return bool(given if given is not None else known and known.ties)


def text_config(adapter: LoraAdapter) -> dict[str, Any]:
    """The configuration of the language model, which is a part of that of a multimodal model."""
    config = dict(adapter.model_config)
    return {**config, **(config.get("text_config") or {})}


def tensor_name(layer: LoraLayer, adapter: LoraAdapter, names: TensorNames) -> str:
    """The name of the base weight of a layer, such as "blk.0.attn_q.weight".

    Raises:
        UnsupportedLayerError: llama.cpp has no tensor for the layer. The message names it and the reason.
    """
    # A language model without head has no "model." before its layers; in a multimodal model it is one of the parts.
    path = layer.path.replace("language_model.", "")
    name = None if layer.kind != "linear" else names(path) or names(f"model.{path}")
    if name is None:
        raise UnsupportedLayerError(
            f"{layer.path}: llama.cpp has no weight for this {layer.kind} layer of a model of type "
            f"{adapter.model_config['model_type']!r}, so a GGUF adapter cannot change it. {_LEAVE_OUT}"
        )
    if name == "output" and is_tied(adapter):
        # llama.cpp looks for "output.weight", and refuses the whole adapter if the model file does not have it.
        raise UnsupportedLayerError(
            f"{layer.path}: this layer is tied to the embeddings, so llama.cpp's model file has no weight of its own "
            f"for it, and a GGUF adapter cannot change it. {_LEAVE_OUT}"
        )
    return f"{name}.weight"


def rows_in_order(layer: LoraLayer, adapter: LoraAdapter, B: Tensor) -> Tensor:
    """`B: (out, rank)` with its rows in the order that llama.cpp's model files have them in.

    Raises:
        AdapterError: the rows are not a multiple of the configuration's head dimension.

    >>> import torch
    >>> config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}
    >>> layer = LoraLayer("model.layers.0.self_attn.q_proj", "linear", torch.zeros(1, 8), torch.arange(8.0)[:, None])
    >>> rows_in_order(layer, LoraAdapter((layer,), model_config=config), layer.B).flatten()
    tensor([0., 2., 1., 3., 4., 6., 5., 7.])
    """
    if not find_architecture(adapter).rotates_pairs or not layer.path.endswith(_QUERIES_AND_KEYS):
        return B
    config = text_config(adapter)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if len(B) % size:
        raise AdapterError(
            f"{layer.path}: its {len(B)} rows are not a multiple of {size}, the head dimension in the model's "
            "configuration. Save the adapter with the configuration of its base model."
        )
    return B.view(-1, 2, size // 2, B.shape[1]).transpose(1, 2).reshape(B.shape)
