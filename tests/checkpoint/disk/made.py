"""Checkpoints of tiny models, adapters for them, their folds in memory, and checks of failed folds on disk."""

from __future__ import annotations

import copy
import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import CheckpointError, HRAError

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 37}


def llama(**fields: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1, **fields))


def bert(kind: str = "BertForMaskedLM", **fields: Any) -> Any:
    return getattr(transformers, kind)(transformers.BertConfig(**SMALL, max_position_embeddings=16, **fields))


def gpt2(kind: str = "GPT2LMHeadModel") -> Any:
    return getattr(transformers, kind)(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=37))


def t5(**fields: Any) -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 37}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0, **fields))


#: Model, adapted layers, dtype of the checkpoint, fields of the configuration.
CASES: dict[str, tuple[Callable[[], Any], list[str], torch.dtype, dict[str, Any]]] = {
    "Llama": (llama, ["q_proj", "v_proj", "down_proj"], torch.bfloat16, {}),
    "Llama, float32": (llama, ["q_proj", "v_proj", "down_proj"], torch.float32, {}),
    "Llama, an output layer": (llama, ["q_proj", "lm_head"], torch.bfloat16, {}),
    "Llama, Gram-Schmidt": (llama, ["q_proj", "down_proj"], torch.bfloat16, {"apply_GS": True}),
    "Llama, Gram-Schmidt without an anchor": (
        llama,
        ["q_proj", "down_proj"],
        torch.bfloat16,
        {"apply_GS": True, "init_weights": False},
    ),
    "Llama, several ranks": (llama, ["q_proj", "v_proj"], torch.bfloat16, {"rank_pattern": {"v_proj": 5}}),
    "BERT": (bert, ["query", "value"], torch.float16, {}),
    "BERT, a classifier": (
        lambda: bert("BertForSequenceClassification"),
        ["query"],
        torch.bfloat16,
        {"task_type": "SEQ_CLS", "bias": "all"},
    ),
    "BERT, biases of layers": (bert, ["query"], torch.bfloat16, {"bias": "hra_only"}),
    "GPT-2": (gpt2, ["c_attn", "c_proj"], torch.bfloat16, {}),
    "GPT-2, float32": (gpt2, ["c_attn", "c_proj"], torch.float32, {}),
    "T5": (t5, ["q", "v", "wo"], torch.bfloat16, {}),
}


def base_of(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """Save a model with random parameters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.to(dtype).eval().save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text('{"as it": "was"}')
    return folder


def adapter_of(model: Any, folder: Path, *targets: str, seed: int = 2, **fields: Any) -> Path:
    """Save an adapter with random vectors, of a copy of the model."""
    adapted = copy.deepcopy(model)
    torch.manual_seed(seed)
    hra_fx.transform(adapted, hra_fx.HRAConfig(**{"r": 3, "target_modules": list(targets), **fields}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or ".hra_u." in name:
                parameter.normal_()
    hra_fx.save_adapter(adapted, folder)
    return folder


def folded_in_memory(model: Any, folder: Path, *adapters: Path) -> Path:
    """Save the model after `fold` of the adapters, in order."""
    for adapter in adapters:
        hra_fx.fold(hra_fx.load_adapter(model, adapter))
    model.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def bits(tensor: Tensor) -> Tensor:
    """Integers in the order of the values: neighbors differ by 1."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    whole = tensor.view(kind).long()
    least = torch.iinfo(kind).min
    return torch.where(whole < 0, least - whole, whole)


def equal_but_for_steps(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Check keys, shapes and dtypes, and that nearly all values differ by at most one unit in the last place."""
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[key].dtype, other[key].shape), key
        near = ((bits(tensor) - bits(other[key])).abs() <= 1).float().mean()
        assert near >= 0.99, (key, float(near))


def picture(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def linear_stack(folder: Path, layers: int = 3, width: int = 6, dtype: torch.dtype = torch.float32) -> Path:
    """Save a checkpoint without config.json: one file for each layer, and an index."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    places = {}
    for i in range(layers):
        name = f"model-{i + 1:05d}-of-{layers:05d}.safetensors"
        state = {f"{i}.{key}": value.to(dtype) for key, value in nn.Linear(width, width + 2).state_dict().items()}
        save_file(state, folder / name, {"made": "by hand"})
        places |= dict.fromkeys(state, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def stack_adapter(folder: Path, layers: int = 3, width: int = 6, seed: int = 3, r: int = 2) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    vectors = {f"base_model.model.{i}.hra_u": torch.randn(width, r, generator=generator) for i in range(layers)}
    save_file(vectors, folder / "adapter_model.safetensors", {"format": "pt"})
    hra_fx.HRAConfig(r=r, target_modules=[str(i) for i in range(layers)]).save_pretrained(folder)
    return folder


def refused(tmp_path: Path, adapter: Any = None, kind: type[HRAError] = CheckpointError, **options: Any) -> str:
    """Return the message without the folder of the test; nothing was written or changed."""
    before = {name: picture(tmp_path / name) for name in ("base", "adapter", "out")}
    names = {path.name for path in tmp_path.iterdir()}
    where = {"base_dir": tmp_path / "base", "out_dir": tmp_path / "out", **options}
    with pytest.raises(kind) as caught:
        hra_fx.fold_checkpoint(adapter_dir=tmp_path / "adapter" if adapter is None else adapter, **where)
    assert {path.name for path in tmp_path.iterdir()} == names
    assert {name: picture(tmp_path / name) for name in before} == before
    return str(caught.value).replace(f"{tmp_path}/", "").replace(str(tmp_path), "TMP")


def stack(tmp_path: Path, **options: Any) -> None:
    linear_stack(tmp_path / "base", **options)
    stack_adapter(tmp_path / "adapter", **options)


def rewrite(tmp_path: Path, **config: Any) -> None:
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def add(tmp_path: Path, **tensors: torch.Tensor) -> None:
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), **tensors}, file)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Context manager in which larger files cannot be written, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
