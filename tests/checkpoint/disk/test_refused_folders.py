"""Folders and files that a fold on disk refuses: the full message, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint.disk import made
from checkpoint.disk.made import refused, stack

import hra_fx

MODEL = (
    "with config.json and safetensors files, such as save_pretrained(folder) or `hf download NAME --local-dir FOLDER` "
    "writes."
)
UNCHANGED = "The output folder is unchanged. Free some space, check the disk, or choose another output folder."


def pipeline(folder: Path) -> None:
    made.linear_stack(folder / "base" / "unet")
    (folder / "base" / "model_index.json").write_text("{}")


@pytest.mark.parametrize(
    ("out", "shown", "name"),
    [
        ("base", "base", "the base, base"),
        ("base/inside", "base/inside", "the base, base"),
        (".", "TMP", "the base, base"),
        ("adapter", "adapter", "adapter adapter, adapter"),
    ],
)
def test_overlapping_folders(tmp_path: Path, out: str, shown: str, name: str) -> None:
    stack(tmp_path)
    message = refused(tmp_path, out_dir=tmp_path / out, overwrite=True)
    assert message == f"{shown}: the output folder overlaps with {name}. Choose a folder outside of it."


def test_an_output_folder_with_files_or_that_is_a_file(tmp_path: Path) -> None:
    stack(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert refused(tmp_path, columns=[]) == (
        "out: the output folder is not empty. Choose another folder, or overwrite=True (--overwrite)."
    )
    message = refused(tmp_path, columns=[], out_dir=tmp_path / "out" / "mine", overwrite=True)
    assert message == "out/mine: is a file. Choose another output folder."


def test_an_output_folder_that_cannot_be_created(tmp_path: Path) -> None:
    stack(tmp_path)
    (tmp_path / "file").touch()
    for out, reason in (("file/x/y", "[Errno 20] Not a directory"), ("o" * 252, "[Errno 36] File name too long")):
        message = refused(tmp_path, columns=[], out_dir=tmp_path / out)
        assert message == f"{out}: cannot write the result ({reason}). {UNCHANGED}"


def test_a_base_that_does_not_exist_or_is_a_file(tmp_path: Path) -> None:
    stack(tmp_path)
    assert refused(tmp_path, base_dir=tmp_path / "none") == f"none: no such folder. Pass one {MODEL}"
    message = refused(tmp_path, base_dir=tmp_path / "base" / "model.safetensors.index.json")
    assert message == f"base/model.safetensors.index.json: is a file. Pass a folder {MODEL}"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_pickles_and_other_formats(tmp_path: Path, name: str) -> None:
    made.stack_adapter(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / name).write_bytes(b"\x80\x04")
    assert refused(tmp_path) == (
        f"base/{name}: only safetensors files are read. Load the model and save it with model.save_pretrained(folder)."
    )


def test_a_folder_without_weights(tmp_path: Path) -> None:
    made.stack_adapter(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    assert refused(tmp_path) == "base: no .safetensors files found. Pass the folder of a checkpoint."
    made.linear_stack(tmp_path / "base" / "unet")
    assert refused(tmp_path) == (
        "base: no .safetensors files found. The subfolders 'unet' have some: pass one of them, or "
        "adapter_dir={name: adapter} (--part)."
    )


def test_a_pickle_next_to_the_weights_is_reported(tmp_path: Path) -> None:
    stack(tmp_path)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (tmp_path / "base" / name).write_bytes(b"x")
    with pytest.warns(hra_fx.HRAWarning) as caught:
        report = hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", columns=[])
    assert str(caught[0].message) == (
        f"{tmp_path / 'out'}: pytorch_model.bin still contain the base model's weights. Delete them, or do not load "
        "them."
    )
    assert "  not folded: pytorch_model.bin" in str(report)


def test_an_adapter_in_the_folder_of_the_base(tmp_path: Path) -> None:
    stack(tmp_path)
    hra_fx.HRAConfig(target_modules=["0"]).save_pretrained(tmp_path / "base")
    assert refused(tmp_path, columns=[]) == (
        "base/adapter_config.json: there is an adapter in the base model's folder, and from_pretrained would load it "
        "on top of the folded weights. Move it to another folder."
    )


@pytest.mark.parametrize("given", [[], {}, {"": []}, {"": None}])
def test_no_adapter(tmp_path: Path, given: Any) -> None:
    stack(tmp_path)
    assert refused(tmp_path, given) == (
        "adapter_dir must name at least one adapter. Pass one or more folders, in order."
    )


@pytest.mark.parametrize("name", ["unet", "../adapter"])
def test_a_part_that_does_not_exist(tmp_path: Path, name: str) -> None:
    stack(tmp_path)
    (tmp_path / "base" / "vae").mkdir()
    message = refused(tmp_path, {name: tmp_path / "adapter"})
    assert message == f"base: no such subfolder {name!r} (adapter_dir, --part). It has 'vae'."


def test_an_adapter_for_an_unknown_part_of_a_pipeline(tmp_path: Path) -> None:
    pipeline(tmp_path)
    made.stack_adapter(tmp_path / "adapter")
    for source in ("user/name", tmp_path / "adapter"):
        shown = str(source).replace(f"{tmp_path}/", "")
        assert refused(tmp_path, source) == (
            f"{shown}: no subfolder with an adapter has the name of a part of the pipeline base, such as 'unet'. Use "
            f"adapter_dir={{'unet': {shown!r}}} (--part unet)."
        )


def test_an_adapter_for_a_part_that_the_pipeline_does_not_have(tmp_path: Path) -> None:
    pipeline(tmp_path)
    (tmp_path / "base" / "text_encoder").mkdir()
    for name in ("unet", "text_encoder_2"):
        made.stack_adapter(tmp_path / "adapter" / name)
    end = (
        "has an adapter, but the pipeline base has no part with this name. Name the parts: "
        "adapter_dir={'unet': 'adapter/unet'} (--part, one part at a time)."
    )
    assert refused(tmp_path) == f"adapter/text_encoder_2: {end}"
    shutil.move(tmp_path / "adapter" / "text_encoder_2" / "adapter_config.json", tmp_path / "adapter")
    assert refused(tmp_path) == f"adapter: {end}"
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    report = hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", columns=[])
    assert report.rotated == ("unet/0.weight", "unet/1.weight", "unet/2.weight")


def test_a_broken_link(tmp_path: Path) -> None:
    stack(tmp_path)
    (tmp_path / "base" / "link").symlink_to(tmp_path / "nothing")
    message = "base/link: is a broken link, or not a regular file. Remove it from the base."
    assert refused(tmp_path) == message


def header(file: Path, change: Any) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


DAMAGE: dict[str, Any] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_bytes(b"some text that is no header"),
    "a shape": lambda file: header(file, lambda e: e["0.bias"].update(shape=[9])),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file(tmp_path: Path, what: str) -> None:
    stack(tmp_path)
    DAMAGE[what](tmp_path / "base" / "model-00001-of-00003.safetensors")
    start = "base/model-00001-of-00003.safetensors: truncated, damaged, or not a safetensors file"
    assert re.fullmatch(rf"{re.escape(start)} \(.+\)\. Save or download it again\.", refused(tmp_path, columns=[]))


def test_an_index_that_does_not_match_its_files(tmp_path: Path) -> None:
    stack(tmp_path)
    index = tmp_path / "base" / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    first, shown = "model-00001-of-00003.safetensors", "base/model.safetensors.index.json"
    cases = (
        (
            places | {"x": "y.safetensors"},
            "lists 'y.safetensors', which is missing from the folder. Download it",
        ),
        (places | {"x": first}, f"lists 'x' in {first!r}, but the file does not have it. Download both"),
    )
    for entries, message in cases:
        index.write_text(json.dumps({"weight_map": entries}))
        assert refused(tmp_path, columns=[]) == f"{shown}: {message} again."
    index.write_text("[]")
    assert refused(tmp_path, columns=[]).startswith(f"{shown}: cannot read the file, or it has no weight_map (")


def test_a_config_that_is_not_an_object(tmp_path: Path) -> None:
    stack(tmp_path)
    (tmp_path / "base" / "config.json").write_text("[1]")
    assert re.fullmatch(r"base/config\.json: must be a JSON object \(.*\)\. Download it again\.", refused(tmp_path))


@pytest.mark.parametrize(
    ("build", "target", "columns", "stored", "given", "actual"),
    [
        (made.gpt2, "c_proj", [], "transformer.h.0.attn.c_proj", "(out, in)", "(in, out)"),
        (made.llama, "q_proj", ["q_proj"], "model.layers.0.self_attn.q_proj", "(in, out)", "(out, in)"),
    ],
)
def test_columns_that_contradict_the_model(
    tmp_path: Path, build: Any, target: str, columns: list[str], stored: str, given: str, actual: str
) -> None:
    """A square weight would be rotated from the wrong side, which `verify` cannot detect."""
    model = build()
    made.base_of(model, tmp_path / "base")
    made.adapter_of(model, tmp_path / "adapter", target)
    assert refused(tmp_path, columns=columns, verify=True) == (
        f"base/model.safetensors: {stored}.weight is {actual} according to config.json, but {given} according to "
        "columns (--columns, --rows). Omit columns, or correct config.json."
    )
