"""The names that programs of guides use without defining them: a tiny Llama in "my-model" and data."""

from __future__ import annotations

from typing import Any

import timm
import torch
from datasets import Dataset
from diffusion_pipelines import stable_diffusion
from integrations.trl_use.runs import SFT_CHATS, base_model
from tiny import llama
from tiny_tokenizer import QUESTION, WORDS, tokenizer
from torch import distributed
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import hra_fx

#: Guides whose programs use such names.
GIVEN = ("training", "keep", "trl", "files", "recipes", "large-models")


def given(guide: str) -> dict[str, Any]:
    """The names of a guide. The current folder, which is empty, gets the model and a pipeline."""
    # With room for protected directions.
    wide = llama(hidden_size=64, intermediate_size=64, vocab_size=len(WORDS))
    (wide if guide == "keep" else base_model("SFT").to(torch.bfloat16)).save_pretrained("my-model")
    tokenizer().save_pretrained("my-model")
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 14, (8, 6)).tolist()])
    usual = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    names = {
        "arguments": TrainingArguments("run", max_steps=2, learning_rate=3e-3, **usual),
        "batches": [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, len(WORDS), (4, 2, 8))],
        "chats": Dataset.from_list(SFT_CHATS),
        "data": rows,
        "device": "cpu",
        "model": wide,
        "preferences": Dataset.from_list([{"prompt": QUESTION, "chosen": " blue", "rejected": " bad red"}] * 8),
        "prompts": Dataset.from_list([{"prompt": QUESTION}] * 8),
        "reward": lambda completions, **others: [float(len(completion)) for completion in completions],
        "texts": Dataset.from_list(SFT_CHATS),
        "tokenizer": tokenizer(),
    }
    if guide == "large-models":
        names["state_dict"] = base_model("SFT").state_dict()
        if distributed.is_initialized():  # by `TrainingArguments`, under torchrun; the guide makes its own group
            distributed.destroy_process_group()
    if guide in ("files", "recipes"):
        pipe = names["pipe"] = stable_diffusion()
        pipe.save_pretrained("my-pipeline")
    if guide == "files":
        hra_fx.transform(pipe.unet, hra_fx.HRAConfig(r=2, target_modules=["to_q", "to_v"]))
    if guide == "recipes":
        prompts = torch.randn(2, 5, pipe.unet.config.cross_attention_dim)
        names |= {
            "batches": [(torch.randn(2, 4, 8, 8), prompts)],
            # Its blocks do not start with zeros.
            "model": timm.create_model("test_resnet", num_classes=10, zero_init_last=False),
            "loader": [(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))],
            "data": rows.with_format("torch"),
            "tokens": DataLoader(rows.with_format("torch"), batch_size=4),
        }
    return names
