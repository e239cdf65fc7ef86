"""`convert`: PEFT computes with the result what the adapted model does; files are those of the functions."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoint.disk import made
from cli.conftest import Shelf
from cli.shell import Answer, answer, mistake, usage
from moe_models import TARGETS, built
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import hra_fx
from hra_fx.lora.save import convert_files

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def plain(shelf: Shelf) -> Any:
    return copy.deepcopy(shelf.model).float()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(3, 15).view(2, 6)).logits
    return found


def by_peft(shelf: Shelf, folder: Path) -> Tensor:
    return logits(peft.PeftModel.from_pretrained(plain(shelf), folder))


def by_us(shelf: Shelf, *folders: Path) -> Tensor:
    model = plain(shelf)
    for folder in folders:
        model = hra_fx.fold(hra_fx.load_adapter(model, folder))
    return logits(model)


@pytest.mark.parametrize(("name", "anchor"), [("my-adapter", 1), ("second", 0), ("orthonormal", 2)])
def test_peft_computes_the_same_with_plain_reflections(shelf: Shelf, tmp_path: Path, name: str, anchor: int) -> None:
    done = Answer("convert", shelf / name, tmp_path, "--to", "peft", "--json").json
    assert (done["form"], done["layers"], done["anchor"]) == ("peft", 4, anchor)
    assert name != "orthonormal" or [key.endswith("hra_vectors") for key in done["dropped"]] == [True] * 4
    torch.testing.assert_close(by_peft(shelf, tmp_path), by_us(shelf, shelf / name), rtol=1e-4, atol=1e-4)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert dict(file.metadata()) == {"format": "pt"}
    tensors = load_file(tmp_path / WEIGHTS)
    assert {key.rpartition(".")[2] for key in tensors} == {"hra_u"}
    config = hra_fx.HRAConfig.from_pretrained(tmp_path)
    assert not config.apply_GS and {u.shape[1] for u in tensors.values()} == {config.r}


@pytest.mark.parametrize("fields", [{}, {"apply_GS": True}, {"modules_to_save": ["lm_head"]}])
def test_from_peft_it_is_what_save_adapter_writes(shelf: Shelf, tmp_path: Path, fields: dict[str, Any]) -> None:
    config = peft.HRAConfig(r=4, target_modules=["q_proj"], init_weights=False, **fields)
    peft.get_peft_model(plain(shelf), config).save_pretrained(tmp_path / "peft")
    answer("convert", tmp_path / "peft", tmp_path / "ours", "--to", "hra_fx")
    torch.testing.assert_close(by_us(shelf, tmp_path / "ours"), by_peft(shelf, tmp_path / "peft"), rtol=1e-4, atol=1e-4)
    hra_fx.save_adapter(hra_fx.load_adapter(plain(shelf), tmp_path / "peft"), tmp_path / "saved")
    ours, saved = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "saved"))
    assert ours.keys() == saved.keys() and all(torch.equal(ours[key], saved[key]) for key in saved)
    assert Answer("inspect", tmp_path / "ours", "--json").json["written_by"] == "hra_fx"


def test_to_us_an_anchor_stays(shelf: Shelf, tmp_path: Path) -> None:
    answer("convert", shelf / "orthonormal", tmp_path, "--to", "hra_fx")
    assert made.picture(tmp_path) == {name: (shelf / "orthonormal" / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def test_keys_without_the_prefix_get_it(shelf: Shelf, tmp_path: Path) -> None:
    folder = made.stack_adapter(tmp_path / "bare", layers=1)
    vectors = load_file(folder / WEIGHTS)
    save_file({key.removeprefix("base_model.model."): u for key, u in vectors.items()}, folder / WEIGHTS)
    answer("convert", folder, tmp_path / "out", "--to", "peft")
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == vectors.keys()


@pytest.mark.parametrize("to", ["peft", "lora"])
def test_an_output_folder_with_other_files(shelf: Shelf, tmp_path: Path, to: str) -> None:
    words = ("convert", shelf / "my-adapter", tmp_path, "--to", to, *(("--base", shelf / "my-model") * (to == "lora")))
    (tmp_path / "notes.txt").write_text("mine")
    assert mistake(*words) == f"{tmp_path}: already exists. Choose another name, or pass --overwrite."
    assert mistake(words[0], words[1], tmp_path / "notes.txt", *words[3:]).endswith(
        "notes.txt: already exists. Choose another name, or pass --overwrite."
    )
    assert made.picture(tmp_path) == {"notes.txt": b"mine"}
    answer(*words, "--overwrite")
    assert made.picture(tmp_path).keys() == {"notes.txt", CONFIG, WEIGHTS}
    (tmp_path / "config.json").write_text("{}")
    for refused in (words, (*words, "--overwrite")):
        assert mistake(*refused).startswith(f"{tmp_path}: contains a model (config.json), and from_pretrained would")


def test_what_is_left_out_of_the_configuration_is_named(shelf: Shelf, tmp_path: Path) -> None:
    source = shutil.copytree(shelf / "my-adapter", tmp_path / "in")
    file = source / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_version": "0.99", "of_tomorrow": 1, "more": []}))
    text = answer("convert", source, tmp_path / "out", "--to", "peft")
    assert "dropped      configuration fields more, of_tomorrow, peft_version" in text
    done = Answer("convert", source, tmp_path / "out", "--to", "hra_fx", "--overwrite", "--json").json
    assert done["fields"] == ["more", "of_tomorrow", "peft_version"]


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 6, "v_proj": 2}},
        {"r": 4, "rank_pattern": {"0.self_attn.q_proj": 3, "v_proj": 1}},
        {"r": 2, "rank_pattern": {"v_proj": 3}, "apply_GS": True},
        {"r": 2, "rank_pattern": {"v_proj": 4}, "apply_GS": True, "init_weights": False},
    ],
    ids=["even", "mixed", "orthonormal", "orthonormal without anchors"],
)
def test_several_ranks_become_one_for_peft(shelf: Shelf, tmp_path: Path, fields: dict[str, Any]) -> None:
    adapter = made.adapter_of(plain(shelf), tmp_path / "ours", "q_proj", "v_proj", **fields)
    answer("convert", adapter, tmp_path / "theirs", "--to", "peft")
    ranks = {tensor.shape[1] for tensor in load_file(tmp_path / "theirs" / WEIGHTS).values()}
    assert ranks == {hra_fx.HRAConfig.from_pretrained(tmp_path / "theirs").r}
    wanted = by_us(shelf, adapter)
    torch.testing.assert_close(by_peft(shelf, tmp_path / "theirs"), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_us(shelf, tmp_path / "theirs"), wanted, rtol=1e-4, atol=1e-4)


def test_odd_and_even_chains_have_no_form_for_peft(shelf: Shelf, tmp_path: Path) -> None:
    fields = {"r": 2, "rank_pattern": {"v_proj": 3}, "init_weights": False}
    adapter = made.adapter_of(plain(shelf), tmp_path / "ours", "q_proj", "v_proj", **fields)
    text = mistake("convert", adapter, tmp_path / "theirs", "--to", "peft")
    assert ": model.layers.0.self_attn.q_proj: 2 reflections cannot be padded to 3: the difference must be" in text
    assert not (tmp_path / "theirs").exists()


def test_experts_have_no_form_for_peft(tmp_path: Path) -> None:
    adapter = made.adapter_of(built("qwen3_moe"), tmp_path / "adapter", "q_proj", target_parameters=TARGETS)
    assert mistake("convert", adapter, tmp_path / "out", "--to", "peft") == (
        f"{adapter / WEIGHTS}: the adapter adapts parameters of experts (target_parameters={TARGETS}), which PEFT's "
        "HRA does not support. Use --to lora."
    )
    answer("convert", adapter, tmp_path / "out", "--to", "hra_fx")
    found, wanted = (load_file(folder / WEIGHTS) for folder in (tmp_path / "out", adapter))
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--rank-pattern"], {"rank_pattern": True}),
        (["--rank", 2, "--dtype", "bfloat16", "--rows"], {"rank": 2, "dtype": "bfloat16", "columns": []}),
        (["--check", "tgi", "-q"], {"check": "tgi"}),
    ],
)
def test_options_are_those_of_the_function(
    shelf: Shelf, tmp_path: Path, words: list[Any], fields: dict[str, Any]
) -> None:
    adapters = [shelf / "my-adapter", shelf / "second"]
    done = Answer("convert", *adapters, tmp_path / "a", "--to", "lora", "--base", shelf / "my-model", *words, "--json")
    result = convert_files(adapters, shelf / "my-model", tmp_path / "b", progress=False, **fields)
    assert made.picture(tmp_path / "a") == made.picture(tmp_path / "b")
    assert (done.code, done.err, done.json["rank"]) == (0, "", result.rank)
    assert done.json["warnings"] == list(result.warnings) and done.json["path"] == (tmp_path / "a").as_posix()
    assert [row["rank"] for row in done.json["rows"]] == [row.rank for row in result.rows]


def test_a_gguf_file(shelf: Shelf, tmp_path: Path) -> None:
    out = tmp_path / "adapter.gguf"
    words = ("convert", shelf / "my-adapter", out, "--to", "gguf", "--base", shelf / "my-model")
    assert answer(*words).startswith(f"{out}: 4 layers as LoRA of rank 4 (gguf, float32)")
    before = out.read_bytes()
    convert_files([shelf / "my-adapter"], shelf / "my-model", tmp_path / "function.gguf", progress=False)
    assert before == (tmp_path / "function.gguf").read_bytes()
    assert mistake(*words) == f"{out}: already exists. Choose another name, or pass --overwrite."
    answer(*words, "--overwrite", "--dtype", "float16")
    assert len(out.read_bytes()) < len(before)


#: Arguments after the adapter and the output folder -> a part of the usage error.
WRONG: dict[tuple[str, ...], str] = {
    ("out", "--to", "onnx"): "Invalid value for '--to': 'onnx' is not one of 'lora', 'gguf', 'peft', 'hra_fx'.",
    ("out", "--to", "lora"): "Invalid value for --base: --to lora needs the folder of the base model",
    ("out.gguf", "--to", "lora", "--base", "x"): "Invalid value for OUT: --to lora writes a folder",
    ("out", "--to", "gguf", "--base", "x"): "Invalid value for OUT: --to gguf writes a .gguf file",
    ("more", "out", "--to", "peft"): "Invalid value for ADAPTER: --to peft converts one adapter, got 2",
    ("out", "--to", "hra_fx", "--base", "x"): "Invalid value for --base: is an option of --to lora and --to gguf",
    ("out", "--to", "peft", "--rank-pattern"): "Invalid value for --rank-pattern: is an option of --to lora",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_options_that_do_not_fit_together(shelf: Shelf, words: tuple[str, ...]) -> None:
    assert WRONG[words] in usage("convert", shelf / "my-adapter", *words)
