"""The zoo's tables of transformers and diffusers: what they hold, and that it builds and runs the same twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from zoo import (
    diffusers_models,
    transformers_audio,
    transformers_moe,
    transformers_multimodal,
    transformers_seq2seq,
    transformers_text,
    transformers_vision,
)
from zoo.entry import Entry

TABLES: dict[str, list[Entry]] = {
    "text": transformers_text.ENTRIES,
    "vision": transformers_vision.ENTRIES,
    "audio": transformers_audio.ENTRIES,
    "multimodal": transformers_multimodal.ENTRIES,
    "seq2seq": transformers_seq2seq.ENTRIES,
    "moe": transformers_moe.ENTRIES,
    "diffusers": diffusers_models.ENTRIES,
}
ENTRIES = {entry.name: entry for table in TABLES.values() for entry in table}
TRANSFORMERS = [name for name in ENTRIES if name.startswith("transformers/")]
DIFFUSERS = {
    "UNet2DConditionModel",
    "UNet2DModel",
    "AutoencoderKL",
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "PixArtTransformer2DModel",
    "ControlNetModel",
}
#: Of each table two or so, of different kinds.
SOME = [
    "transformers/albert",
    "transformers/gpt2",
    "transformers/falcon",
    "transformers/mamba",
    "transformers/longformer",
    "transformers/swin",
    "transformers/detr",
    "transformers/sam",
    "transformers/wav2vec2",
    "transformers/whisper",
    "transformers/clip",
    "transformers/qwen2_vl",
    "transformers/t5",
    "transformers/led",
    "transformers/mixtral",
    "transformers/switch_transformers",
    "diffusers/UNet2DConditionModel",
    "diffusers/FluxTransformer2DModel",
    "diffusers/AutoencoderKL",
]


def tensors(entry: Entry, batch: int, size: int) -> list[Tensor]:
    """All tensors of one output in eval mode, of a model and inputs that are made anew."""
    torch.manual_seed(0)
    model = entry.build().eval()
    torch.manual_seed(1)
    args, kwargs = entry.call(batch, size)
    with torch.no_grad():
        output: Any = model(*args, **kwargs)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def test_no_two_models_of_the_zoo_have_the_same_name() -> None:
    assert len(ENTRIES) == sum(map(len, TABLES.values()))


@pytest.mark.parametrize("group", TABLES)
def test_the_names_of_a_table_begin_with_its_library(group: str) -> None:
    library = "diffusers" if group == "diffusers" else "transformers"
    assert all(entry.name.startswith(f"{library}/") for entry in TABLES[group])


def test_at_least_45_architectures_of_transformers_are_there() -> None:
    assert len(TRANSFORMERS) >= 45
    assert all(len(table) >= 7 for table in TABLES.values())


def test_the_seven_kinds_of_diffusers_are_there() -> None:
    assert {f"diffusers/{kind}" for kind in DIFFUSERS} <= set(ENTRIES)


def test_importing_a_table_imports_no_library() -> None:
    tables = ", ".join(f"zoo.{name}" for name in ("diffusers_models", "transformers_text", "transformers_vision"))
    check = f"import sys, {tables}; assert not {{'transformers', 'diffusers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("name", SOME)
def test_equal_seeds_make_equal_models_and_equal_outputs(name: str) -> None:
    entry = ENTRIES[name]
    for batch, size in ((entry.batches[0], 0), (entry.batches[1], entry.sizes - 1)):
        first, second = tensors(entry, batch, size), tensors(entry, batch, size)
        assert first
        assert len(first) == len(second)
        assert all(a.equal(b) and a.isfinite().all() for a, b in zip(first, second, strict=True))
