"""Adapters and weights that a fold on disk refuses: each message whole, and nothing written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.disk import made
from checkpoint.disk.refusing import add, refused, rewrite, stack
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import hra_fx
from hra_fx.errors import ConfigError, FoldError


def test_layers_that_are_not_there(tmp_path: Path) -> None:
    stack(tmp_path)
    add(tmp_path, **{"base_model.model.block.7.hra_u": torch.ones(6, 2)})
    assert refused(tmp_path, columns=[]) == (
        "adapter/adapter_model.safetensors: it changes block.7.weight, which is not in "
        "base/model.safetensors.index.json. The nearest names are 2.weight, 1.weight, 0.weight. Was the adapter "
        "trained on another base model, or on one that transformers loads under other names? Fold it in memory: "
        "hra_fx.load_adapter, then hra_fx.fold."
    )


def test_an_adapter_of_quite_another_model(tmp_path: Path) -> None:
    model = made.llama()
    made.base_of(model, tmp_path / "base")
    made.stack_adapter(tmp_path / "adapter")
    assert refused(tmp_path).startswith(
        "adapter/adapter_model.safetensors: it changes 0.weight, which is not in base/model.safetensors. "
    )


def test_a_layer_that_the_adapter_misses(tmp_path: Path) -> None:
    stack(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if ".2." not in key}, file)
    assert refused(tmp_path, columns=[]) == (
        "adapter/adapter_model.safetensors: its configuration names 2, and it has no vectors of it. Was the adapter "
        "trained on another base model than base/model.safetensors.index.json, or its configuration edited?"
    )


def test_vectors_of_another_width(tmp_path: Path) -> None:
    made.linear_stack(tmp_path / "base")
    made.stack_adapter(tmp_path / "adapter", width=5)
    assert refused(tmp_path, columns=[]) == (
        "base/model-00001-of-00003.safetensors: 0.weight has shape (8, 6), a layer of 6 inputs, and the adapter's "
        "vectors of 0 have length 5. Was the adapter trained on another base model?"
    )


def test_vectors_of_the_width_of_the_outputs(tmp_path: Path) -> None:
    """Where config.json tells that weights are `(out, in)`, they are no columns."""
    model = made.llama()
    base = made.base_of(model, tmp_path / "base")
    made.adapter_of(model, tmp_path / "adapter", "gate_proj")
    add(tmp_path, **{f"base_model.model.model.layers.{i}.mlp.gate_proj.hra_u": torch.ones(24, 4) for i in range(2)})
    assert refused(tmp_path).startswith(
        "base/model.safetensors: model.layers.0.mlp.gate_proj.weight has shape (24, 16), a layer of 16 inputs, and the"
    )
    assert base.is_dir()


def test_a_rank_that_is_not_the_configurations(tmp_path: Path) -> None:
    stack(tmp_path)
    rewrite(tmp_path, r=5)
    assert refused(tmp_path, columns=[]) == (
        "adapter/adapter_model.safetensors: base_model.model.0.hra_u has shape (6, 2), and its configuration says r=5. "
        "One of the two files is of another adapter; save it again."
    )


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    stack(tmp_path)
    add(tmp_path, **{"0.hra_u": torch.ones(6, 2)})
    told = refused(tmp_path, columns=[])
    assert re.match(r"adapter/adapter_model\.safetensors: (base_model\.model\.)?0\.hra_u is there twice, with ", told)


def test_a_file_without_vectors(tmp_path: Path) -> None:
    stack(tmp_path)
    save_file({"base_model.model.0.bias": torch.ones(8)}, tmp_path / "adapter" / "adapter_model.safetensors")
    assert refused(tmp_path, columns=[]) == (
        "adapter/adapter_model.safetensors: has no vectors (keys that end in 'hra_u'). Save the adapter again."
    )


def test_dependent_vectors_with_gram_schmidt(tmp_path: Path) -> None:
    stack(tmp_path)
    rewrite(tmp_path, apply_GS=True)
    add(tmp_path, **{"base_model.model.0.hra_u": torch.ones(6, 2)})
    assert refused(tmp_path, kind=FoldError, columns=[]) == (
        "adapter/adapter_model.safetensors: base_model.model.0.hra_u: its 2 vectors of length 6 are linearly "
        "dependent, and Gram-Schmidt of such vectors is noise. Train with apply_GS=False, or with init_weights=True "
        "from hra_fx, which starts them apart."
    )


def test_a_broken_configuration(tmp_path: Path) -> None:
    stack(tmp_path)
    rewrite(tmp_path, r=0)
    told = refused(tmp_path, kind=ConfigError, columns=[])
    assert told == "adapter/adapter_config.json: `r` must be a positive int, got 0."


def test_square_weights_that_nothing_tells_of(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file(nn.Sequential(nn.Linear(6, 6)).state_dict(), tmp_path / "base" / "model.safetensors")
    made.stack_adapter(tmp_path / "adapter", layers=1)
    assert refused(tmp_path) == (
        "base/model.safetensors: 0.weight is square, (6, 6), and config.json does not tell of a model of transformers, "
        "diffusers or timm, so that it may be (out, in) or, as in GPT-2, (in, out). Give columns=[] if every weight is "
        "(out, in), or columns=[names of layers that are not]."
    )
    results = {}
    for name, columns in (("rows", []), ("columns", ["0"])):
        hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / name, columns=columns)
        results[name] = made.tensors(tmp_path / name)["0.weight"]
    assert not torch.allclose(results["rows"], results["columns"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_a_packed_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "base").mkdir()
    save_file({"0.weight": torch.zeros(8, 6).to(dtype)}, tmp_path / "base" / "model.safetensors")
    made.stack_adapter(tmp_path / "adapter", layers=1)
    kind = "U8" if dtype is torch.uint8 else "F8_E4M3"
    assert refused(tmp_path, columns=[]) == (
        f"base/model.safetensors: 0.weight is {kind} of shape (8, 6), and weights of BF16, F16, F32, F64 with two "
        "dimensions or more are folded. Take a base model that is not quantised."
    )


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(6, 8)
        self.head.weight = self.body.weight


@pytest.mark.parametrize("path", ["body", "head"])
def test_a_tensor_that_stands_for_another_one_too(tmp_path: Path, path: str) -> None:
    (tmp_path / "base").mkdir()
    save_model(Shared(), str(tmp_path / "base" / "model.safetensors"))
    made.stack_adapter(tmp_path / "adapter", layers=1)
    tensors = {f"base_model.model.{path}.hra_u": torch.ones(6, 2)}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    rewrite(tmp_path, target_modules=[path])
    assert refused(tmp_path, columns=[]) == (
        "base/model.safetensors: it stores body.weight for head.weight too, and does not say whether they are one "
        "layer. Fold it in memory: hra_fx.load_adapter, then hra_fx.fold."
    )


def test_an_unknown_model_that_says_that_it_ties(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({"embed.weight": torch.ones(9, 6)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "of mine", "tie_word_embeddings": true}')
    made.stack_adapter(tmp_path / "adapter", layers=1)
    save_file({"base_model.model.embed.hra_u": torch.ones(6, 2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    rewrite(tmp_path, target_modules=["embed"])
    assert refused(tmp_path, kind=FoldError) == (
        "base/config.json: it says tie_word_embeddings, and transformers does not know its model, so that what "
        "embed.weight is tied to cannot be told. Fold it in memory: hra_fx.load_adapter, then hra_fx.fold."
    )


def test_a_model_whose_forward_asks_whether_it_is_tied(tmp_path: Path) -> None:
    import transformers

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 37}
    config = transformers.SwitchTransformersConfig(
        **sizes, num_decoder_layers=1, num_experts=2, decoder_start_token_id=0
    )
    model: Any = transformers.SwitchTransformersForConditionalGeneration(config)
    made.base_of(model, tmp_path / "base", torch.float32)
    made.stack_adapter(tmp_path / "adapter", layers=1, width=16)
    save_file({"base_model.model.lm_head.hra_u": torch.ones(16, 2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    rewrite(tmp_path, target_modules=["lm_head"])
    told = refused(tmp_path, kind=FoldError)
    assert told.startswith("the model (SwitchTransformersForConditionalGeneration): its forward does otherwise where")
    assert told.endswith("Leave it out with exclude_modules.")


def test_two_adapters_that_want_one_place(tmp_path: Path) -> None:
    model = made.bert("BertForSequenceClassification")
    made.base_of(model, tmp_path / "base")
    first, second = (
        made.adapter_of(model, tmp_path / name, "query", modules_to_save=["classifier"]) for name in ("a", "b")
    )
    (tmp_path / "adapter").mkdir()
    assert refused(tmp_path, [first, second]) == (
        "b/adapter_model.safetensors: classifier.bias has a trained copy in it and in an adapter before it, and only "
        "one can be in place (modules_to_save or bias). Give one of the two."
    )
    third = made.adapter_of(model, tmp_path / "c", "classifier")
    assert refused(tmp_path, [first, third]) == (
        "base/model.safetensors: one adapter rotates classifier.weight and another one saves it in full "
        "(modules_to_save). Give one of the two."
    )


def test_a_saved_module_of_another_shape(tmp_path: Path) -> None:
    made.base_of(made.bert("BertForSequenceClassification", num_labels=2), tmp_path / "base")
    model = made.bert("BertForSequenceClassification", num_labels=5)
    made.adapter_of(model, tmp_path / "adapter", "query", modules_to_save=["classifier"])
    assert refused(tmp_path) == (
        "base/model.safetensors: classifier.bias is BF16 of shape (2,), and the adapter's classifier.bias, saved in "
        "full, torch.float32 of shape (5,). Was it trained on another base model?"
    )


def test_embeddings_of_another_base(tmp_path: Path) -> None:
    model = made.llama()
    made.base_of(model, tmp_path / "base")
    made.adapter_of(model, tmp_path / "adapter", "q_proj", "lm_head")
    own = made.tensors(tmp_path / "base")["lm_head.weight"]
    add(tmp_path, **{"base_model.model.lm_head.base_layer.weight": own.float()})
    assert hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "fits").rotated
    add(tmp_path, **{"base_model.model.lm_head.base_layer.weight": own.float() + 1})
    assert refused(tmp_path) == (
        "adapter/adapter_model.safetensors: lm_head.weight, of shape (37, 16), is a tensor of the base model that it "
        "was trained on, and base/model.safetensors has another lm_head.weight, of shape (37, 16). Give that base "
        "model."
    )


def test_a_key_that_is_nothing(tmp_path: Path) -> None:
    stack(tmp_path)
    add(tmp_path, **{"base_model.model.0.scale": torch.ones(3)})
    assert refused(tmp_path, columns=[]) == (
        "adapter/adapter_model.safetensors: 0.scale is no vector, in no module that the configuration saves, and not "
        "in base/model.safetensors.index.json. No name is like it. Was the adapter trained on another base model?"
    )


def test_a_name_that_may_be_two(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    state = {"attn.weight": torch.ones(8, 6), "attn.in_proj_weight": torch.ones(18, 6)}
    save_file(state, tmp_path / "base" / "model.safetensors")
    made.stack_adapter(tmp_path / "adapter", layers=1)
    save_file({"base_model.model.attn.hra_u": torch.ones(6, 2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    rewrite(tmp_path, target_modules=["attn"])
    assert refused(tmp_path, columns=[]) == (
        "base/model.safetensors: attn.weight may be attn.weight or attn.in_proj_weight, which are both there. Load the "
        "model and fold it in memory: hra_fx.load_adapter, then hra_fx.fold."
    )


def test_numbers_that_do_not_fit_into_the_dtype(tmp_path: Path) -> None:
    """A row that is turned into one direction: its length is over the largest number of float16, no entry is."""
    (tmp_path / "base").mkdir()
    d = 6
    save_file({"0.weight": torch.full((2, d), 60000.0).half()}, tmp_path / "base" / "model.safetensors")
    made.stack_adapter(tmp_path / "adapter", layers=1, r=1)
    vector = torch.full((d, 1), 1 / d**0.5)
    vector[0] -= 1
    add(tmp_path, **{"base_model.model.0.hra_u": vector})
    assert refused(tmp_path, kind=FoldError, columns=[]) == (
        "base/model.safetensors: the folded 0.weight is not finite in F16. Look for NaN or inf in it, or store the "
        "base model in a wider dtype."
    )
