"""Adapters that PEFT wrote: the files that its own merge and `save_pretrained` give, of three libraries' models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from checkpoint.disk import made
from diffusion_models import text_encoder, unet
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

import hra_fx

# PEFT asks transformers for it, wherever it opens an adapter.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def peft_adapter(model: Any, folder: Path, targets: Any, **fields: Any) -> Any:
    """Write an adapter with random vectors by PEFT; its model."""
    torch.manual_seed(3)
    wrapped: Any = peft.get_peft_model(model, peft.HRAConfig(**{"r": 4, "target_modules": targets, **fields}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad or "hra_u" in name:
                parameter.normal_()
    wrapped.save_pretrained(folder)
    return wrapped


TRANSFORMERS: dict[str, tuple[Callable[[], Any], list[str], dict[str, Any]]] = {
    "Llama": (made.llama, ["q_proj", "k_proj", "gate_proj"], {}),
    "Llama, biases": (lambda: made.llama(attention_bias=True), ["q_proj", "k_proj"], {"bias": "hra_only"}),
    "Llama, Gram-Schmidt": (made.llama, ["q_proj"], {"apply_GS": True, "init_weights": False}),
    "BERT, a classifier": (
        lambda: made.bert("BertForSequenceClassification"),
        ["query", "dense"],
        {"task_type": "SEQ_CLS", "bias": "all"},
    ),
    "T5": (made.t5, ["q", "v"], {}),
    "Llama, an output layer": (made.llama, ["q_proj", "lm_head"], {}),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_models_of_transformers(tmp_path: Path, name: str) -> None:
    build, targets, fields = TRANSFORMERS[name]
    model = build()
    base = made.base_of(model, tmp_path / "base", torch.bfloat16, max_shard_size="6KB")
    wrapped = peft_adapter(model, tmp_path / "adapter", targets, **fields)
    wrapped.merge_and_unload().save_pretrained(tmp_path / "peft")
    report = hra_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out", verify=True)
    made.equal_but_for_steps(made.tensors(tmp_path / "out"), made.tensors(tmp_path / "peft"))
    assert report.rotated and not report.untied and len(list(base.glob("*.safetensors"))) > 1


def pipeline(folder: Path) -> dict[str, Any]:
    """A pipeline's folder with two parts that are adapted, and one that is not."""
    parts = {"unet": unet(), "text_encoder": text_encoder()}
    for name, model in parts.items():
        made.base_of(model, folder / name, torch.float16)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return parts


TARGETS = {"unet": ["to_q", "to_k", "conv1", "conv_shortcut", "proj_in"], "text_encoder": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("as_mapping", [False, True])
def test_a_pipeline_of_diffusers(tmp_path: Path, as_mapping: bool) -> None:
    parts = pipeline(tmp_path / "base")
    for name, model in parts.items():
        wrapped = peft_adapter(model.float(), tmp_path / "adapter" / name, TARGETS[name])
        wrapped.merge_and_unload().half().save_pretrained(tmp_path / "peft" / name)
    given: Any = {name: tmp_path / "adapter" / name for name in parts} if as_mapping else tmp_path / "adapter"
    report = hra_fx.fold_checkpoint(tmp_path / "base", given, tmp_path / "out", verify=True)
    for name in parts:
        made.equal_but_for_steps(made.tensors(tmp_path / "out" / name), made.tensors(tmp_path / "peft" / name))
    assert {name.partition("/")[0] for name in report.rotated} == {"unet", "text_encoder"}
    untouched = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "unet/tokenizer.json")
    for name in untouched:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_one_part_of_a_pipeline(tmp_path: Path) -> None:
    parts = pipeline(tmp_path / "base")
    peft_adapter(parts["unet"], tmp_path / "adapter", TARGETS["unet"])
    hra_fx.fold_checkpoint(tmp_path / "base", {"unet": tmp_path / "adapter"}, tmp_path / "out")
    changed = {
        name for name, data in made.picture(tmp_path / "base").items() if (tmp_path / "out" / name).read_bytes() != data
    }
    assert changed == {"unet/diffusion_pytorch_model.safetensors"}


TIMM: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=2, num_classes=5),
        ["qkv", "fc1", "proj"],
    ),
    "convnext": (
        lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5),
        ["fc1", "downsample.1", "stem.0"],
    ),
}


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(tmp_path: Path, name: str) -> None:
    build, targets = TIMM[name]
    model = build()
    save_for_hf(model, tmp_path / "base", safe_serialization="both")
    (tmp_path / "base" / "pytorch_model.bin").unlink()
    wrapped = peft_adapter(model, tmp_path / "adapter", targets)
    merged = wrapped.merge_and_unload()
    report = hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert len(report.rotated) == sum("hra_u" in key for key in made.tensors(tmp_path / "adapter"))
    for key, due in merged.state_dict().items():
        torch.testing.assert_close(state[key], due, rtol=1e-4, atol=1e-5)
    build().load_state_dict(state)
