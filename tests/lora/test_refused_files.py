"""Adapters and base models on disk that cannot be converted to LoRA.

Folds on disk have the same checks of files, and their tests compare all messages. Here, one case shows that each check
is called.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from checkpoint.disk import made
from checkpoint.disk.made import add, rewrite, stack
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from hra_fx.errors import CheckpointError, HRAError, UnsupportedLayerError
from hra_fx.lora.from_files import read_as_lora

FILE = "adapter/adapter_model.safetensors"


def refused(folder: Path, *adapters: str, kind: type[HRAError] = CheckpointError, **options: Any) -> str:
    """The message, without the folder of the test."""
    with pytest.raises(kind) as caught:
        read_as_lora([folder / name for name in adapters or ["adapter"]], folder / "base", **options)
    return str(caught.value).replace(f"{folder}/", "")


def one_layer(folder: Path, weight: torch.Tensor) -> None:
    """Save a base with one weight, and an adapter of its layer."""
    (folder / "base").mkdir()
    save_file({"0.weight": weight}, folder / "base" / "model.safetensors")
    made.stack_adapter(folder / "adapter", layers=1)
    save_file({"base_model.model.0.hra_u": torch.randn(weight[0].numel(), 2)}, folder / FILE)


def missing_layer(folder: Path) -> None:
    stack(folder)
    rewrite(folder, target_modules=["0", "1", "2"])
    save_file({f"base_model.model.{i}.hra_u": torch.ones(6, 2) for i in range(2)}, folder / FILE)


def embeddings_of_another_base(folder: Path) -> None:
    model = made.llama(tie_word_embeddings=True)
    made.base_of(model, folder / "base")
    made.adapter_of(model, folder / "adapter", "q_proj", "lm_head")
    add(folder, **{"base_model.model.lm_head.base_layer.weight": torch.ones(37, 16)})


def two_sets(folder: Path) -> None:
    one_layer(folder, torch.ones(8, 6))
    for name in ("a", "b"):
        save_file({"0.weight": torch.ones(8, 6)}, folder / "base" / f"{name}.safetensors")
    (folder / "base" / "model.safetensors").unlink()


def grouped(folder: Path) -> None:
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    model = timm.create_model("convnext_atto", num_classes=5, **sizes)
    save_for_hf(model, folder / "base", safe_serialization=True, model_args=sizes)
    made.adapter_of(model, folder / "adapter", "stem.0", "conv_dw")


def padded_in_its_forward(folder: Path) -> None:
    """timm's Conv2dSame pads its input in its forward."""
    model = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=5)
    save_for_hf(model, folder / "base", safe_serialization=True)
    made.adapter_of(model, folder / "adapter", "conv_stem")


def output_projection(folder: Path) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    (folder / "base").mkdir()
    save_file(model.state_dict(), folder / "base" / "model.safetensors")
    made.adapter_of(model, folder / "adapter", "out_proj")


def not_finite(folder: Path) -> None:
    weight = torch.ones(8, 6)
    weight[3, 2] = torch.nan
    one_layer(folder, weight.bfloat16())


def unknown_model(folder: Path) -> None:
    one_layer(folder, torch.ones(8, 6, 3, 3))
    (folder / "base" / "config.json").write_text('{"model_type": "of mine"}')


#: How the folders are arranged -> type and start of the error.
CASES: dict[Callable[[Path], Any], tuple[type[HRAError], str]] = {
    missing_layer: (CheckpointError, f"{FILE}: the file has no vectors for 2, which the configuration names."),
    embeddings_of_another_base: (CheckpointError, f"{FILE}: lm_head.weight of shape (37, 16) is a copy of the base"),
    not_finite: (CheckpointError, "base/model.safetensors: 0.weight has values that are infinite, NaN, or too large"),
    two_sets: (CheckpointError, "base: a.safetensors and b.safetensors all have the adapter's layers. Use a folder"),
    output_projection: (UnsupportedLayerError, "attn.out_proj: this layer is the output projection of attention"),
    grouped: (UnsupportedLayerError, "stages.0.blocks.0.conv_dw: Conv2d 8->8 7x7, groups 8 has groups, so the change"),
    padded_in_its_forward: (UnsupportedLayerError, "conv_stem: Conv2d 3->16 3x3 has its own forward, for which PEFT"),
    unknown_model: (CheckpointError, "base: there is no config.json of an installed transformers, diffusers or timm"),
}


@pytest.mark.parametrize("arrange", CASES)
def test_message(tmp_path: Path, arrange: Callable[[Path], Any]) -> None:
    kind, message = CASES[arrange]
    arrange(tmp_path)
    columns = None if (tmp_path / "base" / "config.json").exists() else []
    assert refused(tmp_path, kind=kind, columns=columns).startswith(message)


def test_a_square_weight_of_an_unknown_model(tmp_path: Path) -> None:
    one_layer(tmp_path, torch.ones(6, 6))
    assert "Pass columns=[] (--rows) if every weight is (out, in)" in refused(tmp_path)
    for columns in ([], ["0"]):
        (layer,) = read_as_lora([tmp_path / "adapter"], tmp_path / "base", columns=columns).layers
        assert layer.fan_in_fan_out is bool(columns)


def test_adapters_that_cannot_be_combined(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="adapters must name at least one adapter"):
        read_as_lora([], tmp_path)
    made.base_of(made.bert("BertForSequenceClassification"), tmp_path / "base")
    for name, kind in (("a", "BertForSequenceClassification"), ("bare", "BertModel")):
        made.adapter_of(made.bert(kind), tmp_path / name, "query")
    message = refused(tmp_path, "a", "bare")
    assert message.startswith("bare/adapter_model.safetensors: names layers with another prefix than a/adapter_model")
