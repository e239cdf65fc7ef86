"""The parts of a LoRA adapter that servers do not accept or ignore.

The facts are from the source code of vLLM 0.33.0 (`vllm/lora`, `vllm/config/lora.py`), SGLang 0.5.23
(`sglang/srt/lora`), text-generation-inference 3.3.7 (`models/__init__.py`, `utils/adapter.py`), TensorRT-LLM
(`_torch/peft/lora` at commit 1630fc3), llama.cpp (`src/llama-adapter.cpp`) and Ollama 0.33.0-rc2 (which starts the
server of llama.cpp). docs/serving.md has a recipe for each.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from hra_fx.errors import ConfigError
from hra_fx.lora.adapter import LoraAdapter, exact_targets, parameter_targets
from hra_fx.lora.gguf_format import is_tied
from hra_fx.selection.suggestions import some_of


@dataclass(frozen=True)
class _Server:
    """The facts about one server. In a sentence, `{}` is a list of layers or modules.

    `bias` and `saved` are verbs: what it does with trained biases and `modules_to_save`. `ranks` are the values of its
    rank option, which is not needed up to `rank_default`. A layer in `companions` needs another one in the same block.
    With `target_list`, `target_modules` must be a list of names; with `all_blocks`, a layer name is ignored unless it
    is adapted in every block. `tied_head` says whether it loads an output layer that is tied to the embeddings.
    """

    name: str
    bias: str = "refuses"
    saved: str = "refuses"
    saved_allowed: Collection[str] = ()
    ranks: tuple[int, ...] = ()
    rank_default: int = 0
    rank_option: str = ""
    layers: str = ".*"
    other_layers: str = ""
    companions: tuple[tuple[str, str], ...] = ()
    target_list: bool = False
    all_blocks: bool = False
    tied_head: bool = True
    rank_pattern: bool = False
    formats: tuple[str, ...] = ("peft",)


_SERVERS = {
    "vllm": _Server(
        "vLLM 0.33.0",
        saved_allowed=("classifier", "score"),
        rank_pattern=True,
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        rank_default=16,
        rank_option="start it with `--max-lora-rank {}`",
        layers=r"(?!(.*\.)?lm_head$).*",
        other_layers="refuses {} in many models (Mistral, Qwen2) and accepts it in others (Llama, Qwen3)",
    ),
    "sglang": _Server(
        "SGLang 0.5.23",
        bias="does not support",
        saved="ignores",
        layers=r"(.*\.)?lm_head|(.*\.)?layers\.\d+\.(.*\.)?((q|k|v|o|qkv|gate|up|down|gate_up)_proj"
        r"|q_a_proj|kv_a_proj_with_mqa|q_b_proj|kv_b_proj|wq_b|wk|weights_proj|qkvr|wo_ud)",
        other_layers="does not accept {}: the names are not choices of its `--lora-target-modules`",
        companions=(("q_proj", "v_proj"), ("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")),
        target_list=True,
    ),
    "tgi": _Server(
        "text-generation-inference 3.3.7",
        bias="ignores",
        saved="ignores",
        layers=r"model\.layers\.\d+\.(self_attn\.(q|k|v|o|qkv)_proj|mlp\.((gate|up|down)_proj|c_fc|c_proj))",
        other_layers="ignores {}",
        all_blocks=True,
    ),
    "tensorrt-llm": _Server(
        "TensorRT-LLM",
        rank_default=64,
        rank_option="set `max_lora_rank: {}` in its `lora_config`",
        layers=r".*\.\d+\.\w+\.(q|k|v|o|qkv|gate|up|down|gate_up)_proj",
        other_layers="ignores or refuses {}, unless `trtllm_modules_to_hf_modules` in its `lora_config` maps the names",
    ),
    "llama.cpp": _Server("llama.cpp", tied_head=False, formats=("gguf",)),
    "ollama": _Server("Ollama", tied_head=False, formats=("gguf", "peft")),
}


def facts_of(server: str) -> _Server:
    """What a server accepts, by the server's name."""
    if server not in _SERVERS:
        raise ConfigError(f"`check` must be one of {', '.join(map(repr, _SERVERS))}, got {server!r}.")
    return _SERVERS[server]


def check_for_server(
    server: str, adapter: LoraAdapter, rank: int, *, file_format: str = "peft", rank_pattern: bool = False
) -> list[str]:
    """Return sentences about everything in this adapter that a server does not accept or ignores; may be empty.

    `rank` is the rank of all layers in the file; with `rank_pattern`, the largest one.
    """
    facts = facts_of(server)
    if file_format not in facts.formats:
        return [f"{facts.name} reads the format of {' or '.join(facts.formats)}, not that of {file_format}."]
    others = [f"{layer.path} ({layer.kind})" for layer in adapter.layers if layer.kind != "linear"]
    modules = sorted(set(adapter.modules_to_save) - set(facts.saved_allowed))
    found = [*_rank(facts, rank), *_names(facts, adapter)]
    if modules:
        found.append(f"{facts.saved} `modules_to_save`, here {_shown(modules)}: fold the adapter")
    if adapter.trainable_token_indices:
        found.append("is not known to load trained tokens (`trainable_token_indices`): fold the adapter")
    if adapter.bias != "none":
        found.append(f"{facts.bias} trained biases, here `bias={adapter.bias!r}`: fold the adapter")
    if others:
        found.append(f"adapts linear layers only, not {_shown(others)}: fold the adapter")
    if rank_pattern and not facts.rank_pattern:
        found.append("expects one rank for all layers: omit `rank_pattern`")
    return [f"{facts.name} {sentence}." for sentence in found]


def _rank(facts: _Server, rank: int) -> list[str]:
    if not facts.rank_default or rank <= facts.rank_default:
        return []
    value = next((allowed for allowed in facts.ranks or (rank,) if allowed >= rank), None)
    option = "pass a smaller `rank`, or fold it" if value is None else facts.rank_option.format(value)
    return [f"accepts ranks up to {facts.rank_default} by default, but the adapter has {rank}: {option}"]


def _names(facts: _Server, adapter: LoraAdapter) -> list[str]:
    """Sentences about linear layers that the server does not support, or only together with others."""
    adapted = [layer.path for layer in adapter.layers]
    paths = [layer.path for layer in adapter.layers if layer.kind == "linear"]
    known = [path for path in paths if re.fullmatch(facts.layers, path)]
    others = set(adapter.modules).difference(adapted)
    found = []
    if unknown := [path for path in paths if path not in known]:
        found.append(facts.other_layers.format(_shown(unknown)))
    for name, needed in facts.companions:
        blocks = [path.removesuffix(name) for path in known if path.rpartition(".")[2] == name]
        if alone := [f"{block}{name}" for block in blocks if f"{block}{needed}" in others]:
            found.append(f"does not load {_shown(alone)} without `{needed}` of the same block: adapt both")
    if facts.target_list and (isinstance(exact_targets(adapted, adapter.modules), str) or parameter_targets(adapter)):
        found.append(
            "needs a list in `target_modules`, but PEFT needs a regular expression or `target_parameters` to match "
            "only these layers: fold the adapter"
        )
    kinds = {_in_any_block(path) for path in known}
    missing = [path for path in adapter.modules if path not in known and _in_any_block(path) in kinds]
    if facts.all_blocks and missing:
        found.append(f"ignores a layer name unless it is adapted in every block; not adapted: {_shown(missing)}")
    heads = [path for path in paths if path.rpartition(".")[2] == "lm_head"]
    if heads and not facts.tied_head and is_tied(adapter):
        found.append(f"has no tensor for {_shown(heads)}, which is tied to the embeddings: fold the adapter")
    return found


def _in_any_block(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path)


def _shown(names: list[str]) -> str:
    return some_of([f"`{name}`" for name in names], 3)
