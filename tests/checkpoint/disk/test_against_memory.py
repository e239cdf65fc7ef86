"""Folds on disk, compared with the files that `fold` and `save_pretrained` write, and with PEFT's merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import transformers
from checkpoint.disk import made
from diffusion_models import text_encoder, unet
from oracles import dense_q, dense_weight, relative_error
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

import hra_fx

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*untied.*:hra_fx.HRAWarning"),
    # PEFT reads it from transformers models when it loads an adapter.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def folded(
    tmp_path: Path, build: Callable[[], Any], targets: list[str], dtype: torch.dtype = torch.bfloat16, **fields: Any
) -> Any:
    """Fold on disk, compare the tensors with the fold in memory, and return the report."""
    model = build()
    base = made.base_of(model, tmp_path / "base", dtype, max_shard_size="6KB")
    adapter = made.adapter_of(model, tmp_path / "adapter", *targets, **fields)
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    loaded = type(model).from_pretrained(base, dtype="auto")
    made.folded_in_memory(loaded, tmp_path / "memory", adapter)
    made.equal_but_for_steps(made.tensors(tmp_path / "out"), made.tensors(tmp_path / "memory"))
    return report


@pytest.mark.parametrize("name", made.CASES)
def test_a_checkpoint_equals_the_fold_in_memory(tmp_path: Path, name: str) -> None:
    build, targets, dtype, fields = made.CASES[name]
    report = folded(tmp_path, build, targets, dtype, **fields)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    assert not report.untied and report.rotated and len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def tied() -> Any:
    return made.llama(tie_word_embeddings=True)


def detector() -> Any:
    """A model that ties layers in numbered blocks: its heads."""
    backbone = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "out_features": ["stage3", "stage4"]}
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "num_queries": 4}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_feature_levels": 2}
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(**backbone), with_box_refine=True, **sizes
    )
    return transformers.DeformableDetrForObjectDetection(config).float()


HEAD = "model.decoder.bbox_embed.0.layers.1"
#: Model, adapted layers, fields of the configuration, and tensors that are untied.
TIED: dict[str, tuple[Callable[[], Any], list[str], dict[str, Any], dict[str, str]]] = {
    "Llama": (tied, ["q_proj", "lm_head"], {}, {"lm_head.weight": "model.embed_tokens.weight"}),
    "Llama, embeddings trained": (
        tied,
        ["q_proj"],
        {"modules_to_save": ["embed_tokens"]},
        {"lm_head.weight": "model.embed_tokens.weight"},
    ),
    "GPT-2": (made.gpt2, ["c_attn", "lm_head"], {}, {"lm_head.weight": "transformer.wte.weight"}),
    "BERT": (
        made.bert,
        ["query", "decoder"],
        {},
        {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
    "detector": (detector, [HEAD], {}, {"bbox_embed.0.layers.1.weight": f"{HEAD}.weight"}),
}


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_are_untied(tmp_path: Path, name: str) -> None:
    build, targets, fields, untied = TIED[name]
    report = folded(tmp_path, build, targets, **fields)
    assert untied.items() <= report.untied.items()
    assert f"untied: {next(iter(report.untied))} (from {next(iter(report.untied.values()))})" in str(report)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "memory")]
    assert configs[0]["tie_word_embeddings"] is False
    assert all(configs[0][name] == configs[1][name] for name in configs[1] if name != "backbone_config")
    loaded = type(build()).from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    state = made.tensors(tmp_path / "out")
    assert all(torch.equal(loaded[key], state[key]) for key in untied)
    assert not any(torch.equal(state[key], state[source]) for key, source in untied.items() if key.endswith(".weight"))


def test_a_model_that_ties_weights_when_loaded_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(hra_fx.HRAWarning, match="T5Config sets tie_word_embeddings=True when it is loaded"):
        report = folded(tmp_path, made.t5, ["q", "lm_head"])
    assert set(report.untied) == {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}


def test_embeddings_that_were_trained_together_stay_tied(tmp_path: Path) -> None:
    report = folded(tmp_path, tied, ["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    assert not report.untied and report.given == ("model.embed_tokens.weight",)


def test_several_adapters_are_folded_in_order(tmp_path: Path) -> None:
    model = made.llama()
    base = made.base_of(model, tmp_path / "base", torch.float32)
    first = made.adapter_of(model, tmp_path / "first", "q_proj", "o_proj", seed=4)
    second = made.adapter_of(model, tmp_path / "second", "q_proj", seed=5, r=2)
    hra_fx.fold_checkpoint(base, [first, second], tmp_path / "out")
    chains = [load_file(adapter / "adapter_model.safetensors") for adapter in (first, second)]
    folded = made.tensors(tmp_path / "out")
    for name, due in made.tensors(base).items():
        key = f"base_model.model.{name.removesuffix('.weight')}.hra_u"
        for chain in chains:
            due = dense_weight(due, dense_q(chain[key])) if key in chain else due
        assert relative_error(folded[name], due) < 1e-7, name


# ---- compared with PEFT, which merges an adapter into a model in memory ----


def peft_adapter(model: Any, folder: Path, targets: Any, **fields: Any) -> Any:
    """Save an adapter with random vectors with PEFT, and return its model."""
    torch.manual_seed(3)
    wrapped: Any = peft.get_peft_model(model, peft.HRAConfig(**{"r": 4, "target_modules": targets, **fields}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad or "hra_u" in name:
                parameter.normal_()
    wrapped.save_pretrained(folder)
    return wrapped


def pipeline(folder: Path) -> dict[str, Any]:
    """Save a pipeline with two parts to adapt and one other part."""
    parts = {"unet": unet(), "text_encoder": text_encoder()}
    for name, model in parts.items():
        made.base_of(model, folder / name, torch.float16)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return parts


def changed(one: Path, other: Path) -> set[str]:
    """The files that differ between two folders with the same names of files."""
    before, after = made.picture(one), made.picture(other)
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


TARGETS = {"unet": ["to_q", "to_k", "conv1", "conv_shortcut", "proj_in"], "text_encoder": ["q_proj", "v_proj"]}


def test_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    parts = pipeline(tmp_path / "base")
    for name, model in parts.items():
        wrapped = peft_adapter(model.float(), tmp_path / "adapter" / name, TARGETS[name])
        wrapped.merge_and_unload().half().save_pretrained(tmp_path / "peft" / name)
    report = hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    for name in parts:
        made.equal_but_for_steps(made.tensors(tmp_path / "out" / name), made.tensors(tmp_path / "peft" / name))
    assert {name.partition("/")[0] for name in report.rotated} == {"unet", "text_encoder"}
    weights = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert changed(tmp_path / "base", tmp_path / "out") == weights
    hra_fx.fold_checkpoint(tmp_path / "base", {"unet": tmp_path / "adapter" / "unet"}, tmp_path / "one")
    assert changed(tmp_path / "base", tmp_path / "one") == {"unet/diffusion_pytorch_model.safetensors"}


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
