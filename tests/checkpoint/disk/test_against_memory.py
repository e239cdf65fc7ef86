"""Folds on disk give the files of a fold in memory and `save_pretrained`, and of PEFT."""

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
from hra_fx.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*untied.*:hra_fx.HRAWarning"),
    # PEFT asks transformers for it, wherever it opens an adapter.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TIED: dict[str, tuple[Callable[[], Any], list[str], dict[str, Any], dict[str, str]]] = {
    "Llama": (
        lambda: made.llama(tie_word_embeddings=True),
        ["q_proj", "lm_head"],
        {},
        {"lm_head.weight": "model.embed_tokens.weight"},
    ),
    "Llama, embeddings trained": (
        lambda: made.llama(tie_word_embeddings=True),
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
}


def both(tmp_path: Path, build: Callable[[], Any], targets: list[str], dtype: torch.dtype, **fields: Any) -> Any:
    """The report, the folder that was folded on disk, and the one that was folded in memory."""
    model = build()
    base = made.base_of(model, tmp_path / "base", dtype)
    adapter = made.adapter_of(model, tmp_path / "adapter", *targets, **fields)
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    loaded = type(model).from_pretrained(base, dtype="auto")
    return report, tmp_path / "out", made.folded_in_memory(loaded, tmp_path / "memory", adapter)


@pytest.mark.parametrize("name", made.CASES)
def test_a_checkpoint_is_what_the_fold_in_memory_saves(tmp_path: Path, name: str) -> None:
    build, targets, dtype, fields = made.CASES[name]
    report, out, memory = both(tmp_path, build, targets, dtype, **fields)
    made.equal_but_for_steps(made.tensors(out), made.tensors(memory))
    assert (out / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    assert not report.untied and report.rotated


@pytest.mark.parametrize("name", TIED)
def test_what_was_tied_gets_a_place_of_its_own(tmp_path: Path, name: str) -> None:
    build, targets, fields, untied = TIED[name]
    report, out, memory = both(tmp_path, build, targets, torch.bfloat16, **fields)
    made.equal_but_for_steps(made.tensors(out), made.tensors(memory))
    assert report.untied == untied
    assert f"untied: {next(iter(untied))} (from {next(iter(untied.values()))})" in str(report)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, memory)]
    assert configs[0] == configs[1] and configs[0]["tie_word_embeddings"] is False
    model = build()
    loaded = type(model).from_pretrained(out, dtype="auto")
    state = made.tensors(out)
    assert all(torch.equal(loaded.state_dict()[key], state[key]) for key in untied)


def detector() -> Any:
    """It ties layers in numbered blocks: those of its heads."""
    backbone = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "out_features": ["stage3", "stage4"]}
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "num_queries": 4}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_feature_levels": 2}
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(**backbone), with_box_refine=True, **sizes
    )
    return transformers.DeformableDetrForObjectDetection(config)


def test_tied_layers_in_blocks_are_untied(tmp_path: Path) -> None:
    head = "model.decoder.bbox_embed.0.layers.1"
    report, out, memory = both(tmp_path, detector, [head], torch.float32)
    made.equal_but_for_steps(made.tensors(out), made.tensors(memory))
    assert len(report.rotated) == 1 and len(report.untied) > 1
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert not torch.equal(made.tensors(out)[f"{head}.weight"], made.tensors(out)["bbox_embed.0.layers.1.weight"])


def test_a_model_that_ties_again_when_it_is_loaded_is_named(tmp_path: Path) -> None:
    with pytest.warns(hra_fx.HRAWarning, match="T5Config sets tie_word_embeddings=True when it is loaded"):
        report, out, memory = both(tmp_path, made.t5, ["q", "lm_head"], torch.bfloat16)
    made.equal_but_for_steps(made.tensors(out), made.tensors(memory))
    assert set(report.untied) == {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}


def test_embeddings_that_were_trained_as_one_stay_one(tmp_path: Path) -> None:
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
    build = TIED["Llama"][0]
    report, out, memory = both(tmp_path, build, ["q_proj"], torch.bfloat16, **saved)
    made.equal_but_for_steps(made.tensors(out), made.tensors(memory))
    assert not report.untied and report.given == ("model.embed_tokens.weight",)


def test_several_adapters_go_in_one_after_the_other(tmp_path: Path) -> None:
    model = made.llama()
    base = made.base_of(model, tmp_path / "base", torch.float32)
    first = made.adapter_of(model, tmp_path / "first", "q_proj", "o_proj", seed=4)
    second = made.adapter_of(model, tmp_path / "second", "q_proj", seed=5, r=2)
    hra_fx.fold_checkpoint(base, [first, second], tmp_path / "out")
    hra_fx.fold_checkpoint(base, first, tmp_path / "once")
    hra_fx.fold_checkpoint(tmp_path / "once", second, tmp_path / "twice")
    twice = made.tensors(tmp_path / "twice")
    for name, tensor in made.tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, twice[name])
    key = "model.layers.1.self_attn.q_proj"
    chains = [load_file(a / "adapter_model.safetensors")[f"base_model.model.{key}.hra_u"] for a in (first, second)]
    due = dense_weight(dense_weight(made.tensors(base)[f"{key}.weight"], dense_q(chains[0])), dense_q(chains[1]))
    assert relative_error(made.tensors(tmp_path / "out")[f"{key}.weight"], due) < 1e-7


def test_weights_in_columns_by_the_dense_product(tmp_path: Path) -> None:
    model = made.gpt2()
    base = made.base_of(model, tmp_path / "base", torch.float64)
    adapter = made.adapter_of(model, tmp_path / "adapter", "c_attn", "attn.c_proj")
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    chains = load_file(adapter / "adapter_model.safetensors")
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_proj"):
        q = dense_q(chains[f"base_model.model.{name}.hra_u"])
        due = dense_weight(made.tensors(base)[f"{name}.weight"].mT, q).mT
        assert relative_error(made.tensors(tmp_path / "out")[f"{name}.weight"], due) < 1e-14


# ---- unfolded ----


@pytest.mark.parametrize(
    ("name", "dtype"), [("Llama", torch.bfloat16), ("GPT-2", torch.float16), ("GPT-2", torch.float32)]
)
def test_a_fold_is_taken_back(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    build, targets = {"Llama": (made.llama, ("q_proj", "down_proj")), "GPT-2": (made.gpt2, ("c_attn", "c_proj"))}[name]
    model = build()
    base = made.base_of(model, tmp_path / "base", dtype)
    adapters = [
        made.adapter_of(model, tmp_path / "first", *targets, seed=1),
        made.adapter_of(model, tmp_path / "second", targets[0], seed=2, apply_GS=True, init_weights=False),
    ]
    folded = hra_fx.fold_checkpoint(base, adapters, tmp_path / "folded", verify=True)
    report = hra_fx.unfold_checkpoint(tmp_path / "folded", adapters, tmp_path / "back", verify=True)
    assert report.rotated == folded.rotated
    before, after, between = (made.tensors(folder) for folder in (base, tmp_path / "back", tmp_path / "folded"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if key in report.rotated:
            assert relative_error(between[key], tensor) > 0.1
            assert relative_error(after[key], tensor) < torch.finfo(dtype).eps
        else:
            assert torch.equal(tensor, after[key])
    files = {name: data for name, data in made.picture(base).items() if not name.endswith(".safetensors")}
    assert files.items() <= made.picture(tmp_path / "back").items()


def test_what_was_untied_stays_so(tmp_path: Path) -> None:
    model = made.llama(tie_word_embeddings=True)
    base = made.base_of(model, tmp_path / "base")
    adapter = made.adapter_of(model, tmp_path / "adapter", "lm_head")
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "folded")
    report = hra_fx.unfold_checkpoint(tmp_path / "folded", adapter, tmp_path / "back")
    state = made.tensors(tmp_path / "back")
    torch.testing.assert_close(state["lm_head.weight"], state["model.embed_tokens.weight"], rtol=0.02, atol=0.01)
    assert not report.untied
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "folded" / "config.json").read_bytes()


def test_what_an_adapter_replaced_is_lost(tmp_path: Path) -> None:
    model = made.llama(attention_bias=True)
    base = made.base_of(model, tmp_path / "base")
    adapter = made.adapter_of(model, tmp_path / "adapter", "q_proj", bias="hra_only")
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "folded")
    with pytest.raises(CheckpointError) as caught:
        hra_fx.unfold_checkpoint(tmp_path / "folded", adapter, tmp_path / "back")
    assert str(caught.value) == (
        f"{adapter / 'adapter_model.safetensors'}: the adapter replaced model.layers.0.self_attn.q_proj.bias "
        "(modules_to_save or bias), whose old value is lost. Use the base checkpoint."
    )
    assert not (tmp_path / "back").exists()


# ---- against PEFT, which merges an adapter into a model in memory ----


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
