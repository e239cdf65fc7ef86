"""The names that programs of guides use without defining them: a tiny Llama in "my-model" and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
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

Names = Mapping[str, Any]


def training(model: Any) -> Names:
    """A Trainer's arguments, and tokens to train on."""
    arguments = TrainingArguments("run", max_steps=2, report_to=[], use_cpu=True, learning_rate=3e-3, disable_tqdm=True)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 14, (8, 6)).tolist()]
    return {"model": model, "arguments": arguments, "data": Dataset.from_list(rows)}


def large_models() -> Names:
    """Without the process group that `TrainingArguments` makes under torchrun: the guide makes its own."""
    given = training(None)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return {
        **given,
        "device": "cpu",
        "state_dict": base_model("SFT").state_dict(),
        "texts": Dataset.from_list(SFT_CHATS),
        "tokenizer": tokenizer(),
    }


def wide_model() -> Any:
    """A model with room for protected directions."""
    return llama(hidden_size=64, intermediate_size=64, vocab_size=len(WORDS))


def keep() -> Names:
    """A Trainer's arguments and data, and a wide model in "my-model"."""
    wide_model().save_pretrained("my-model")
    given = training(None)
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, len(WORDS), (4, 2, 8))]
    return {**given, "batches": batches, "tokenizer": tokenizer()}


def trl() -> Names:
    return {
        "chats": Dataset.from_list(SFT_CHATS),
        "preferences": Dataset.from_list([{"prompt": QUESTION, "chosen": " blue", "rejected": " bad red"}] * 8),
        "prompts": Dataset.from_list([{"prompt": QUESTION}] * 8),
        "reward": lambda completions, **others: [float(len(completion)) for completion in completions],
        "tokenizer": tokenizer(),
    }


def recipes() -> Names:
    """Data for each recipe, a pipeline in "my-pipeline", and a ResNet whose blocks do not start with zeros."""
    stable_diffusion().save_pretrained("my-pipeline")
    rows = training(None)["data"].with_format("torch")
    prompts = torch.randn(2, 5, stable_diffusion().unet.config.cross_attention_dim)
    return {
        "batches": [(torch.randn(2, 4, 8, 8), prompts)],
        "model": timm.create_model("test_resnet", num_classes=10, zero_init_last=False),
        "loader": [(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))],
        "tokens": DataLoader(rows, batch_size=4),
        "data": rows,
    }


def files() -> Names:
    """A pipeline with an adapter, and the pipeline without it in "my-pipeline"."""
    stable_diffusion().save_pretrained("my-pipeline")
    pipe = stable_diffusion()
    hra_fx.transform(pipe.unet, hra_fx.HRAConfig(r=2, target_modules=["to_q", "to_v"]))
    return {"pipe": pipe}


#: Guide -> makes these names, in an empty folder.
GIVEN: dict[str, Callable[[], Names]] = {
    "training": lambda: training(wide_model()),
    "keep": keep,
    "trl": trl,
    "files": files,
    "recipes": recipes,
    "large-models": large_models,
}


def save_my_model(folder: Path) -> None:
    """Write the model and its tokenizer that guides call "my-model"."""
    base_model("SFT").to(torch.bfloat16).save_pretrained(folder / "my-model")
    tokenizer().save_pretrained(folder / "my-model")
