"""Models that tie what is in numbered blocks, as Deformable DETR does its heads: a fold unties them as any others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint.disk import made
from oracles import dense_q, dense_weight, relative_error
from safetensors.torch import load_file
from torch import Tensor

import hra_fx

HEAD = "model.decoder.bbox_embed.0.layers.1"
BACKBONE = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "out_features": ["stage3", "stage4"]}
SIZES = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "num_queries": 4},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_feature_levels": 2},
}


def detector() -> Any:
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(**BACKBONE), with_box_refine=True, **SIZES
    )
    return transformers.DeformableDetrForObjectDetection(config)


def adapted(tmp_path: Path) -> tuple[Any, Path, Path]:
    """A model with an adapter at one of two layers that are tied, its base, and its adapter."""
    torch.manual_seed(0)
    base = detector()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "bbox_embed" in name:  # whose last layers start at zero
                parameter.normal_(std=0.3)
    base.save_pretrained(tmp_path / "base")
    adapter = made.adapter_of(detector(), tmp_path / "adapter", HEAD)
    model = type(detector()).from_pretrained(tmp_path / "base").eval()
    return hra_fx.load_adapter(model, adapter), tmp_path / "base", adapter


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    found = model.eval()(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    return torch.cat([found.pred_boxes.flatten(), found.logits.flatten()])


def loaded(folder: Path) -> Any:
    return type(detector()).from_pretrained(folder)


def test_on_disk(tmp_path: Path) -> None:
    model, base, adapter = adapted(tmp_path)
    due, before = outputs(model), outputs(loaded(base))
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    assert relative_error(due, before) > 1e-5, "the adapter does something"
    assert relative_error(outputs(loaded(tmp_path / "out")), due) < 1e-6
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    stored, other = f"{HEAD}.weight", f"{HEAD.removeprefix('model.decoder.')}.weight"
    weight = old[stored] if stored in old else old[other]
    chain = made.tensors(adapter)[f"base_model.model.{HEAD}.hra_u"]
    assert relative_error(new[stored], dense_weight(weight, dense_q(chain))) < 1e-6
    assert torch.equal(new[other], weight)
    assert len(report.rotated) == 1 and len(report.untied) > 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_in_memory(tmp_path: Path) -> None:
    model, _, _ = adapted(tmp_path)
    due = outputs(model)
    with pytest.warns(hra_fx.HRAWarning, match=rf"untied: {HEAD} .*tie_word_embeddings is False now"):
        hra_fx.fold(model)
    assert relative_error(outputs(model), due) < 1e-6
    model.save_pretrained(tmp_path / "memory")
    assert relative_error(outputs(loaded(tmp_path / "memory")), due) < 1e-6
