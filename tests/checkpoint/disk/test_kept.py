"""A fold on disk keeps everything else byte for byte, and all folders after an error; `verify` finds damage.

Names in files may have or lack the prefix of a model.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint.disk import made
from checkpoint.disk.made import files_of_at_most, stack
from oracles import dense_q, dense_weight, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hra_fx
from hra_fx.checkpoint.adapter import read_adapter
from hra_fx.checkpoint.disk.plan import plan_fold
from hra_fx.checkpoint.disk.writing import check_copy, check_file
from hra_fx.errors import CheckpointError, FoldError


def test_other_files_other_tensors_and_metadata_are_kept_byte_for_byte(tmp_path: Path) -> None:
    base = made.linear_stack(tmp_path / "base", layers=2)
    odd = {
        "a": torch.arange(3, dtype=torch.uint8),
        "f8": torch.zeros(5, dtype=torch.float8_e4m3fn),
        "none": torch.zeros(0),
    }
    save_file(odd, base / "other.safetensors", {"who": "me"})
    (base / "sub" / "deeper").mkdir(parents=True)
    (base / "sub" / "deeper" / "script.py").write_text("#!/bin/sh")
    (base / "sub" / "deeper" / "script.py").chmod(0o755)
    (base / "empty").mkdir(mode=0o750)
    base.chmod(0o700)
    before = made.picture(base)
    adapter = made.stack_adapter(tmp_path / "adapter", layers=2)
    with pytest.warns(hra_fx.HRAWarning, match=r"out: other\.safetensors still contain the base model's weights"):
        report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[], verify=True)
    assert made.picture(base) == before
    after = made.picture(tmp_path / "out")
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    for i, name in enumerate(sorted(changed)):
        old, new = load_file(base / name), load_file(tmp_path / "out" / name)
        assert old.keys() == new.keys() and torch.equal(old[f"{i}.bias"], new[f"{i}.bias"])
        assert not torch.equal(old[f"{i}.weight"], new[f"{i}.weight"])
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata() == {"made": "by hand"}
    for path, mode in {"sub/deeper/script.py": 0o755, "empty": 0o750, ".": 0o700}.items():
        assert os.stat(tmp_path / "out" / path).st_mode & 0o777 == mode
    assert report.kept == (Path("other.safetensors"),) and "  not folded: other.safetensors" in str(report)
    assert report.bytes == sum(map(len, after.values()))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_weights_of_several_blocks(tmp_path: Path) -> None:
    for columns, shape in ((False, (3000, 500)), (True, (500, 3000))):
        folder = tmp_path / str(columns)
        (folder / "base").mkdir(parents=True)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        save_file({"0.weight": weight, "0.bias": torch.ones(3000)}, folder / "base" / "model.safetensors")
        adapter = made.stack_adapter(folder / "adapter", layers=1, width=500, r=4)
        hra_fx.fold_checkpoint(folder / "base", adapter, folder / "out", verify=True)
        q = dense_q(made.tensors(adapter)["base_model.model.0.hra_u"])
        due = dense_weight(weight.mT if columns else weight, q)
        folded = made.tensors(folder / "out")["0.weight"]
        assert relative_error(folded.mT if columns else folded, due) < 2**-9


def test_convolutions_and_attention(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (1, 3), groups=2), nn.Conv3d(2, 3, 2), nn.MultiheadAttention(8, 2)
    )
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    adapter = made.adapter_of(model, tmp_path / "adapter", "0", "1", "2", "3")
    hra_fx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out", columns=[], verify=True)
    state = load_file(tmp_path / "out" / "model.safetensors")
    for key, chain in made.tensors(adapter).items():
        name = key.split(".")[2] + (".in_proj_weight" if ".3." in key else ".weight")
        assert relative_error(state[name], dense_weight(model.state_dict()[name], dense_q(chain))) < 1e-7


def test_two_variants_of_one_checkpoint_are_both_folded(tmp_path: Path) -> None:
    model = made.llama()
    base = made.base_of(model, tmp_path / "base", torch.float32)
    save_file({key: t.half() for key, t in made.tensors(base).items()}, base / "model.fp16.safetensors")
    adapter = made.adapter_of(model, tmp_path / "adapter", "q_proj")
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    whole, half = (load_file(tmp_path / "out" / name) for name in ("model.safetensors", "model.fp16.safetensors"))
    for name in report.rotated:
        torch.testing.assert_close(half[name].float(), whole[name], rtol=2e-3, atol=2e-3)
    assert not report.kept


@pytest.mark.parametrize(("saved", "adapted"), [("BertModel", "BertForMaskedLM"), ("BertForMaskedLM", "BertModel")])
def test_the_prefix_of_a_model_with_a_head(tmp_path: Path, saved: str, adapted: str) -> None:
    model = made.bert(saved)
    base = made.base_of(model, tmp_path / "base", torch.float32)
    adapter = made.adapter_of(made.bert(adapted), tmp_path / "adapter", "query", "output.dense")
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    assert len(report.rotated) == 6
    prefix = "bert." if saved == "BertForMaskedLM" else ""
    assert f"{prefix}encoder.layer.0.attention.self.query.weight" in report.rotated
    loaded = type(made.bert(adapted)).from_pretrained(base)
    memory = made.folded_in_memory(loaded, tmp_path / "memory", adapter)
    theirs = {key.removeprefix("bert."): tensor for key, tensor in made.tensors(memory).items()}
    for name in report.rotated:
        torch.testing.assert_close(made.tensors(tmp_path / "out")[name], theirs[name.removeprefix("bert.")])


def test_columns_are_found_without_the_prefix(tmp_path: Path) -> None:
    """The names in GPT-2's checkpoint on the Hub lack the prefix that its class has."""
    model = made.gpt2("GPT2Model")
    base = made.base_of(model, tmp_path / "base", torch.float32)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    adapter = made.adapter_of(made.gpt2(), tmp_path / "adapter", "attn.c_proj", "lm_head")
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    q = dense_q(made.tensors(adapter)["base_model.model.transformer.h.0.attn.c_proj.hra_u"])
    due = dense_weight(made.tensors(base)["h.0.attn.c_proj.weight"].mT, q).mT
    assert relative_error(made.tensors(tmp_path / "out")["h.0.attn.c_proj.weight"], due) < 1e-7
    assert report.untied == {"lm_head.weight": "wte.weight"}
    q = dense_q(made.tensors(adapter)["base_model.model.lm_head.hra_u"])
    due = dense_weight(made.tensors(base)["wte.weight"], q)
    assert relative_error(made.tensors(tmp_path / "out")["lm_head.weight"], due) < 1e-7


def test_a_head_that_the_base_does_not_have_is_added(tmp_path: Path) -> None:
    base = made.base_of(made.bert("BertModel"), tmp_path / "base", torch.bfloat16, max_shard_size="6KB")
    model = made.bert("BertForSequenceClassification", num_labels=3)
    adapter = made.adapter_of(model, tmp_path / "adapter", "query", task_type="SEQ_CLS")
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    assert report.given == ("classifier.bias", "classifier.weight")
    state = made.tensors(tmp_path / "out")
    assert state["classifier.weight"].dtype is torch.bfloat16
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in state.values())
    loaded = type(model).from_pretrained(tmp_path / "out", num_labels=3, dtype="auto")
    assert torch.equal(loaded.classifier.weight, state["classifier.weight"])


def test_links_are_followed_as_in_the_hub_cache(tmp_path: Path) -> None:
    base = made.linear_stack(tmp_path / "blobs", layers=2)
    (tmp_path / "base").mkdir()
    for file in base.iterdir():
        (tmp_path / "base" / file.name).symlink_to(file)
    adapter = made.stack_adapter(tmp_path / "adapter", layers=2)
    hra_fx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "linked", columns=[])
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[])
    assert made.picture(tmp_path / "linked") == made.picture(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "linked").iterdir())


def test_layers_that_the_model_does_not_load_need_no_vectors(tmp_path: Path) -> None:
    """Such as the blocks for multi-token prediction in some checkpoints."""
    model = made.llama()
    base = made.base_of(model, tmp_path / "base")
    extra = {"model.layers.2.self_attn.q_proj.weight": torch.ones(16, 16)}
    save_file(made.tensors(base) | extra, base / "model.safetensors")
    adapter = made.adapter_of(model, tmp_path / "adapter", "q_proj")
    assert len(hra_fx.fold_checkpoint(base, adapter, tmp_path / "out").rotated) == 2


def test_an_empty_folder_is_used_and_a_full_one_replaced_with_overwrite(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, adapter = made.linear_stack(tmp_path / "base"), made.stack_adapter(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[])
    due = made.picture(tmp_path / "out")
    (tmp_path / "out" / "of before").write_text("x")
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[], overwrite=True)
    assert made.picture(tmp_path / "out") == due
    shutil.rmtree(tmp_path / "out")
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "new" / "deep" / "out", columns=[])
    assert made.picture(tmp_path / "new" / "deep" / "out") == due
    assert capfd.readouterr() == ("", ""), "a progress bar without a terminal"


def test_layers_that_have_other_names_in_the_file(tmp_path: Path) -> None:
    """As in LLaVA checkpoints of earlier transformers releases."""
    sizes = made.SMALL | {"num_hidden_layers": 1}
    vision = transformers.CLIPVisionConfig(
        **{key: sizes[key] for key in sizes if key != "vocab_size"}, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**sizes))
    model = transformers.LlavaForConditionalGeneration(config)
    base = made.base_of(model, tmp_path / "base", torch.float32)
    adapter = made.adapter_of(model, tmp_path / "adapter", "k_proj", modules_to_save=["linear_1"])
    old = {
        key.replace("model.language_model.", "language_model.model.").removeprefix("model."): tensor
        for key, tensor in made.tensors(base).items()
    }
    save_file(old, base / "model.safetensors", {"format": "pt"})
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    memory = hra_fx.fold(hra_fx.load_adapter(type(model).from_pretrained(base, dtype="auto"), adapter))
    folded = type(model).from_pretrained(tmp_path / "out", dtype="auto")
    torch.testing.assert_close(folded.state_dict(), memory.state_dict())
    assert made.tensors(tmp_path / "out").keys() == old.keys()
    assert report.rotated and report.given and not report.untied


# ---- disks that are full ----


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path) -> None:
    stack(tmp_path, layers=4, width=64)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    big = {"3.weight": torch.ones(400, 64), "3.bias": torch.ones(400)}
    save_file(big, base / "model-00004-of-00004.safetensors", {"format": "pt"})
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[])
    due = made.picture(tmp_path / "out")
    for refusing, size in (("weights", 50_000), ("a copy", 200_000)):
        if refusing == "a copy":
            (base / "zzz").write_bytes(bytes(300_000))
        with files_of_at_most(size), pytest.raises(CheckpointError) as caught:
            hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[], overwrite=True)
        start, end = str(caught.value).split("File too large")
        assert start.startswith(f"{tmp_path / 'out'}: cannot write the result (")
        assert end.endswith(
            "). The output folder is unchanged. Free some space, check the disk, or choose another output folder."
        )
        assert made.picture(tmp_path / "out") == due
        assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_a_base_that_is_larger_than_the_disk_is_refused_at_once(tmp_path: Path) -> None:
    """A sparse file of 2 TiB."""
    stack(tmp_path)
    base = tmp_path / "base"
    size = 1 << 41
    text = json.dumps({"9.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(base / "x.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    with pytest.raises(CheckpointError, match=r"bytes are needed, but only [\d,]+ are free\. Free some space, or"):
        hra_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out", columns=[])
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    assert os.path.getsize(base / "x.safetensors") > size


# ---- what `verify=True` finds ----


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
C_ATTN = "transformer.h.0.attn.c_attn.weight"
#: The changed value: tensor, place, by how much; and the message.
CHANGES: dict[str, tuple[str, tuple[int, ...], float, str]] = {
    "norm of a row": (QUERY, (3, 2), 2.0, rf"row 3 of {QUERY} has norm .+ in the base, and a rotation pres"),
    "norm of a column": (C_ATTN, (3, 2), 2.0, rf"row 2 of {C_ATTN} has norm "),
    "NaN": (QUERY, (5, 2), float("nan"), rf"row 5 of {QUERY} has norm nan"),
    "a copy": ("bert.pooler.dense.bias", (0,), 1.0, r"bert.pooler.dense.bias differs from what was written\."),
    "a new value": ("classifier.weight", (0, 0), 1.0, r"classifier.weight differs from what was written\."),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_value_is_found(tmp_path: Path, what: str) -> None:
    name, place, by, message = CHANGES[what]
    gpt2 = name == C_ATTN
    model = made.gpt2() if gpt2 else made.bert("BertForSequenceClassification")
    base = made.base_of(model, tmp_path / "base")
    saved, target = (None, "c_attn") if gpt2 else (["classifier"], "query")
    adapter = made.adapter_of(model, tmp_path / "adapter", target, modules_to_save=saved)
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    assert report.verified and "verified: row norms are preserved" in str(report)
    plan: Any = plan_fold(base, {"": [read_adapter(adapter)]}, None, base)
    file = tmp_path / "out" / "model.safetensors"
    check_file(plan.files[file.name], file)
    state = load_file(file)
    state[name][place] += by
    save_file(state, file, {"format": "pt"})
    with pytest.raises(FoldError, match=rf"^{file}: {message}.*Check the disk"):
        check_file(plan.files[file.name], file)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
def test_reflections_that_nearly_cancel_each_other_pass(tmp_path: Path, dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "base").mkdir()
    weight = torch.randn(40, 64, dtype=torch.float64, generator=generator).to(dtype)
    save_file({"0.weight": weight}, tmp_path / "base" / "model.safetensors")
    adapter = made.stack_adapter(tmp_path / "adapter", layers=1, width=64, r=63)
    near = torch.randn(64, 1, dtype=torch.float64, generator=generator)
    near = near + spread * torch.randn(64, 63, dtype=torch.float64, generator=generator)
    save_file({"base_model.model.0.hra_u": near}, adapter / "adapter_model.safetensors", {"format": "pt"})
    report = hra_fx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out", columns=[], verify=True)
    assert 0 <= report.rounding < max(torch.finfo(dtype).eps / 2, 1e-15)
    folded = load_file(tmp_path / "out" / "model.safetensors")["0.weight"]
    assert relative_error(folded, dense_weight(weight, dense_q(near))) < max(torch.finfo(dtype).eps, 1e-12)


def test_a_copied_file_that_differs(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for file in (one, other):
        file.write_bytes(b"the same")
    check_copy(one, other)
    other.write_bytes(b"not same")
    with pytest.raises(FoldError, match=rf"^{other}: the copy differs from {one}\. Check the disk\.$"):
        check_copy(one, other)
