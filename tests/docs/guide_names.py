"""The names that programs of guides use without defining them: a tiny Llama in "my-model", data, adapted models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from datasets import Dataset
from diffusion_pipelines import stable_diffusion
from integrations.trl_use.runs import QUESTION, SFT_CHATS, base_model, tokenizer
from moe_models import built
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import hra_fx

Names = Mapping[str, Any]
CONFIG = hra_fx.HRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def adapted() -> Any:
    """A Llama with an adapter that changes its outputs."""
    model = hra_fx.transform(base_model("SFT"), CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".hra_u." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def training(model: Any) -> Names:
    """A Trainer's arguments, and tokens to train on."""
    arguments = TrainingArguments("run", max_steps=2, report_to=[], use_cpu=True, learning_rate=3e-3, disable_tqdm=True)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 14, (8, 6)).tolist()]
    return {"model": model, "arguments": arguments, "data": Dataset.from_list(rows)}


def large_models() -> Names:
    return {
        **training(None),
        "device": "cpu",
        "state_dict": base_model("SFT").state_dict(),
        "texts": Dataset.from_list(SFT_CHATS),
        "tokenizer": tokenizer(),
    }


def trl() -> Names:
    return {
        "chats": Dataset.from_list(SFT_CHATS),
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


def serving() -> Names:
    """An adapter to export, a pipeline with one, the pipeline without it in "my-pipeline", and another LoRA."""
    hra_fx.save_adapter(adapted(), "my-adapter")
    hra_fx.save_as_lora(adapted(), "other-lora")
    stable_diffusion().save_pretrained("my-pipeline")
    pipe = stable_diffusion()
    hra_fx.transform(pipe.unet, hra_fx.HRAConfig(r=2, target_modules=["to_q", "to_v"]))
    inputs = {"input_ids": torch.randint(0, 14, (3, 5))}
    return {"model": adapted(), "base": base_model("SFT").eval(), "pipe": pipe, "inputs": inputs}


#: Guide -> makes these names, in an empty folder.
GIVEN: dict[str, Callable[[], Names]] = {
    "training": lambda: training(adapted()),
    "trl": trl,
    "serving": serving,
    "recipes": recipes,
    "moe": lambda: {"model": built("mixtral", torch.float32)},
    "quantized": lambda: training(None),
    "large-models": large_models,
    "distributed": dict,
}


def save_my_model(folder: Path) -> None:
    """Write the model and its tokenizer that guides call "my-model"."""
    base_model("SFT").to(torch.bfloat16).save_pretrained(folder / "my-model")
    tokenizer().save_pretrained(folder / "my-model")
