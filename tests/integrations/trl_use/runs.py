"""Trainers of TRL over a tiny Llama: with PEFT's HRA, with that after `from_peft`, and with a transformed model.

All train pairs, PEFT's layers by torch's parametrization. They start at the same pairs, without differences, and train
with SGD, so that logs and pairs can be compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from datasets import Dataset
from one_layer import normal
from peft_sides import in_pairs
from tiny import llama
from tiny_tokenizer import QUESTION, WORDS, tokenizer
from torch import nn
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import hra_fx

PEFT, TAKEN, OURS, NAMED, LORA = "PEFT", "from_peft", "transformed", "get_peft_model", "LoRA"
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of `datasets` outside of the folder of the test; a file has this fixture if it imports it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def _chat(answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]}


#: Chats to fine-tune on.
SFT_CHATS = [_chat(answer) for answer in ("blue", "the sky is blue", "good blue", "no red")] * 3
_DATA: dict[str, list[dict[str, Any]]] = {
    "SFT": SFT_CHATS,
    "DPO": [{"prompt": QUESTION, "chosen": " the sky is blue", "rejected": " bad red"}] * 8,
    "GRPO": [{"prompt": QUESTION}] * 8,
    "reward": [{"chosen": "the sky is blue", "rejected": "bad red no"}] * 8,
}
_TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SFT": (SFTTrainer, SFTConfig, {"max_length": 16}),
    "DPO": (DPOTrainer, DPOConfig, {}),
    "GRPO": (GRPOTrainer, GRPOConfig, {"num_generations": 2, "max_completion_length": 6}),
    "reward": (RewardTrainer, RewardConfig, {}),
}


def base_model(method: str) -> Any:
    kind = "LlamaForSequenceClassification" if method == "reward" else "LlamaForCausalLM"
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_labels": 1}
    tokens = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2}
    # Deeper than the usual start, so that adapters have an effect.
    return llama(kind, **sizes, **tokens, initializer_range=0.3)


def trainer(kind: str, method: str, folder: Path, base: Any = None, targets: Any = TARGETS, **options: Any) -> Any:
    """A trainer that is ready to train."""
    make, configure, usual = _TRAINERS[method]
    arguments: dict[str, Any] = {
        "max_steps": 3,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "bf16": False,  # which TRL takes by default; PEFT then computes Q in bfloat16
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
    }
    more = {"output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True}
    args = configure(**(arguments | more | usual | options))
    fields = {"r": 4, "target_modules": targets, "task_type": "SEQ_CLS" if method == "reward" else "CAUSAL_LM"}
    model = base_model(method) if base is None else base
    given: dict[str, Any] = {"train_dataset": Dataset.from_list(_DATA[method]), "processing_class": tokenizer()}
    if method == "GRPO":
        given["reward_funcs"] = _longer_is_better
    if kind in (OURS, NAMED):
        adapt = hra_fx.transform if kind == OURS else hra_fx.get_peft_model
        model = adapt(model, hra_fx.HRAConfig(**fields))
    else:
        given["peft_config"] = (peft.LoraConfig if kind == LORA else peft.HRAConfig)(**fields)
    made = make(model, args=args, **given)
    if kind == PEFT:
        in_pairs(made.model)
    if kind == TAKEN:
        hra_fx.from_peft(made.model)
    redraw(made.model, seed=0)
    return made


def _longer_is_better(completions: list[str], **others: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def redraw(model: nn.Module, seed: int = 100) -> None:
    """Other pairs without differences, with which the model is the base model again."""
    with torch.no_grad():
        for number, pairs in enumerate(vectors_of(model).values()):
            pairs.zero_()[..., 0] = normal(seed + number, *pairs.shape[:2], dtype=pairs.dtype)


def vectors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Path in the base model -> pairs."""
    found = {name: p for name, p in model.named_parameters() if ".hra_u." in name}
    return {name.removeprefix("base_model.model.").partition(".hra_u.")[0]: p for name, p in found.items()}


def logs(trainer: Any, *keys: str) -> list[list[float]]:
    """The values of some keys in the log of each step."""
    return [[float(entry[key]) for key in keys] for entry in trainer.state.log_history if "loss" in entry]
