"""Tiny models of transformers, adapted by `transform` or `get_peft_model`, and a Trainer for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from layers.checking import dense_weights
from tiny import SMALL, VOCABULARY, bert, llama, t5
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import hra_fx

SHAPES = {"transform": hra_fx.transform, "HRAModel": hra_fx.get_peft_model}
#: A classifier and a language model, each adapted in one of the two ways.
pairs = pytest.mark.parametrize(("kind", "shape"), [("bert", "transform"), ("llama", "HRAModel")])


_LLAMA: dict[str, Any] = {**SMALL, "num_key_value_heads": 1, "num_labels": 3, "pad_token_id": 0}
#: For the task types and default targets of PEFT.
MODELS: dict[str, Callable[[], Any]] = {
    "bert": partial(bert, "BertModel", **SMALL),
    "bert, classes": partial(bert, num_labels=3, **SMALL),
    "bert, tokens": partial(bert, "BertForTokenClassification", num_labels=3, **SMALL),
    "bert, answers": partial(bert, "BertForQuestionAnswering", **SMALL),
    "llama": partial(llama, **_LLAMA),
    "llama, classes": partial(llama, "LlamaForSequenceClassification", **_LLAMA),
    "t5": t5,
}


def tiny(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """One of `MODELS` in eval mode, with norms and biases that are not those of a new model."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """The arguments of one call of a model of `tiny`."""
    ids = torch.randint(3, 37, (3, 7), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids[:, :5]} if hasattr(model, "decoder") or "T5" in type(model).__name__ else {}
    return {"input_ids": ids, **more}


BASES: dict[str, Callable[..., Any]] = {"bert": bert, "llama": llama}
FIELDS: dict[str, dict[str, Any]] = {
    "bert": {"r": 3, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    "llama": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"},
}


def config_for(kind: str, **fields: object) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**(FIELDS[kind] | fields))


def adapted(kind: str, shape: str, *, seed: int = 1, base: nn.Module | None = None, **fields: object) -> Any:
    """A model with an adapter that is drawn from `seed`."""
    base = BASES[kind]() if base is None else base
    torch.manual_seed(seed)
    return SHAPES[shape](base, config_for(kind, **fields))


def trained_in(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def rotated(base: nn.Module, model: nn.Module, *adapters: str) -> Any:
    """A copy of the base model whose weights are `W Q_a Q_b ...`, by the dense product in float64."""
    twin = copy.deepcopy(base).eval()
    twin.load_state_dict(dense_weights(base, model, adapters or ("default",)), strict=False)
    return twin


def tokens_of(count: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def samples(kind: str, count: int) -> list[dict[str, Tensor]]:
    tokens = tokens_of(count, 8)
    labels = tokens if kind == "llama" else tokens[:, 0] % 2
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def batch(kind: str, count: int = 4) -> dict[str, Tensor]:
    data = samples(kind, count)
    return {key: torch.stack([sample[key] for sample in data]) for key in data[0]}


def logits_of(model: Any, kind: str) -> Tensor:
    """The logits of `batch`, in eval mode."""
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=batch(kind)["input_ids"]).logits
    return found


def trainer_of(maker: type[Trainer], kind: str, model: nn.Module, folder: Path, **arguments: Any) -> Trainer:
    """A run of six steps of AdamW on one small set of data."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "no",
        "save_steps": 3,  # transformers warns where a run is resumed with another number
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    data = samples(kind, 16)
    return maker(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(settings | arguments)),
        train_dataset=data,
        eval_dataset=data[:4],
    )
