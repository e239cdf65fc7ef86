"""Folds on disk give the files of `load_adapter`, `fold` and `save_pretrained` in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint.disk import made
from oracles import dense_q, dense_weight, relative_error
from safetensors.torch import load_file

import hra_fx
from hra_fx.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*untied.*:hra_fx.HRAWarning")

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
