"""`unfold_checkpoint` takes a fold back, up to the rounding of the dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.disk import made

import hra_fx
from hra_fx.errors import CheckpointError

MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "Llama": (made.llama, ("q_proj", "down_proj")),
    "GPT-2": (made.gpt2, ("c_attn", "c_proj")),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [("Llama", torch.bfloat16), ("GPT-2", torch.float16), ("GPT-2", torch.float32)]
)
def test_a_fold_is_taken_back(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    build, targets = MODELS[name]
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
            assert float((tensor.double() - between[key].double()).norm() / tensor.double().norm()) > 0.1
            assert (
                float((tensor.double() - after[key].double()).norm() / tensor.double().norm()) < torch.finfo(dtype).eps
            )
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
