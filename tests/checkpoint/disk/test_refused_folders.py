"""Folders and files that a fold on disk refuses: each message whole, and nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint.disk import made
from checkpoint.disk.refusing import refused, stack

import hra_fx
from hra_fx.errors import CheckpointError


@pytest.mark.parametrize("name", ["base", "base/inside", "."])
def test_an_out_dir_in_or_around_what_is_read(tmp_path: Path, name: str) -> None:
    stack(tmp_path)
    what = f"out_dir: {name if name != '.' else 'TMP'} is, holds or lies in "
    told = refused(tmp_path, out_dir=tmp_path / name)
    assert told == f"{what}base (base_dir), which is never written to. Give a folder beside it."


def test_an_out_dir_that_is_the_adapter(tmp_path: Path) -> None:
    stack(tmp_path)
    told = refused(tmp_path, out_dir=tmp_path / "adapter", overwrite=True)
    assert told == (
        "out_dir: adapter is, holds or lies in adapter (adapter_dir adapter), which is never written to. Give a folder "
        "beside it."
    )


def test_an_out_dir_with_files_or_that_is_one(tmp_path: Path) -> None:
    stack(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    told = refused(tmp_path, columns=[])
    assert told == "out_dir: out is there and not empty. Give another folder, or overwrite=True."
    told = refused(tmp_path, columns=[], out_dir=tmp_path / "out" / "mine", overwrite=True)
    assert told == "out/mine: is a file. Give a folder that does not exist yet."


def test_a_base_that_is_not_there_or_a_file(tmp_path: Path) -> None:
    stack(tmp_path)
    hub = "A model of the Hub: huggingface_hub.snapshot_download(name)."
    assert refused(tmp_path, base_dir=tmp_path / "none") == f"none: there is no such folder here. {hub}"
    file = tmp_path / "base" / "model.safetensors.index.json"
    told = refused(tmp_path, base_dir=file)
    assert told == f"base/model.safetensors.index.json: is a file. Give the folder that it is in. {hub}"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.ckpt", "model.gguf", "tf_model.h5"])
def test_pickles_and_other_formats_are_named(tmp_path: Path, name: str) -> None:
    made.stack_adapter(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / name).write_bytes(b"\x80\x04")
    assert refused(tmp_path) == (
        f"base/{name}: is a pickle or of another library, and is never read. Save the model as safetensors first: "
        "load it, then model.save_pretrained(folder)."
    )


def test_a_folder_without_weights(tmp_path: Path) -> None:
    made.stack_adapter(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    told = refused(tmp_path)
    assert told == "base: there is no .safetensors file in it. Give the folder of a checkpoint."
    made.linear_stack(tmp_path / "base" / "unet")
    told = refused(tmp_path)
    assert told == (
        "base: there is no .safetensors file in it. There are some in its subfolders 'unet': give "
        "adapter_dir={subfolder: adapter}, or that folder."
    )


def test_a_pickle_beside_is_told_of(tmp_path: Path) -> None:
    stack(tmp_path)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (tmp_path / "base" / name).write_bytes(b"x")
    with pytest.warns(hra_fx.HRAWarning) as caught:
        report = hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", columns=[])
    assert str(caught[0].message) == (
        f"{tmp_path / 'out'}: pytorch_model.bin hold the weights of the base still. Delete them, or do not load them."
    )
    assert "with the base's weights still: pytorch_model.bin" in str(report)


def test_an_adapter_in_the_folder_of_the_base(tmp_path: Path) -> None:
    stack(tmp_path)
    hra_fx.HRAConfig(target_modules=["0"]).save_pretrained(tmp_path / "base")
    assert refused(tmp_path, columns=[]) == (
        "base/adapter_config.json: an adapter lies in the folder of the base model, and from_pretrained would load it "
        "on top of the folded weights. Move it to a folder of its own."
    )


@pytest.mark.parametrize("given", [[], {}, {"": []}, {"": None}])
def test_no_adapter(tmp_path: Path, given: Any) -> None:
    stack(tmp_path)
    told = refused(tmp_path, given)
    assert told == "adapter_dir: it names no adapter. Give a folder, or several in their order."


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    stack(tmp_path)
    (tmp_path / "base" / "vae").mkdir()
    told = refused(tmp_path, {"unet": tmp_path / "adapter"})
    assert told == "adapter_dir: 'unet' is no folder in base. There are 'vae'."
    told = refused(tmp_path, {"../adapter": tmp_path / "adapter"})
    assert told == "adapter_dir: '../adapter' is no folder in base. There are 'vae'."


def test_an_adapter_that_does_not_say_for_which_part_it_is(tmp_path: Path) -> None:
    made.linear_stack(tmp_path / "base" / "unet")
    (tmp_path / "base" / "model_index.json").write_text("{}")
    made.stack_adapter(tmp_path / "adapter")
    assert refused(tmp_path) == (
        "adapter_dir: adapter has no subfolder with an adapter that is called as a part of the pipeline base, such as "
        "'unet'. Say for which part it is: adapter_dir={'unet': 'adapter'}."
    )


def test_an_adapter_for_a_part_that_the_pipeline_does_not_have(tmp_path: Path) -> None:
    """It would have been left out without a word, beside one that has its place."""
    made.linear_stack(tmp_path / "base" / "unet")
    (tmp_path / "base" / "text_encoder").mkdir()
    (tmp_path / "base" / "model_index.json").write_text("{}")
    for name in ("unet", "text_encoder_2"):
        made.stack_adapter(tmp_path / "adapter" / name)
    what = "has an adapter too, and the pipeline base has no part of that name. Say which are meant, and for which"
    end = f"{what} parts: adapter_dir={{'unet': 'adapter/unet'}}."
    assert refused(tmp_path) == f"adapter_dir: adapter/text_encoder_2 {end}"
    shutil.move(tmp_path / "adapter" / "text_encoder_2" / "adapter_config.json", tmp_path / "adapter")
    assert refused(tmp_path) == f"adapter_dir: adapter {end}"
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    report = hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", columns=[])
    assert report.rotated == ("unet/0.weight", "unet/1.weight", "unet/2.weight")


def test_a_name_on_the_hub_for_a_pipeline(tmp_path: Path) -> None:
    made.linear_stack(tmp_path / "base" / "unet")
    (tmp_path / "base" / "model_index.json").write_text("{}")
    assert refused(tmp_path, "user/name") == (
        "adapter_dir: user/name is no folder here, and a name on the Hub does not tell for which part of the pipeline "
        "base it is. Say so: adapter_dir={'unet': 'user/name'}."
    )


def test_a_folder_of_adapters(tmp_path: Path) -> None:
    made.linear_stack(tmp_path / "base")
    made.stack_adapter(tmp_path / "adapter" / "mine")
    assert refused(tmp_path) == (
        "adapter/adapter_config.json: there is no such file. Adapters are in its subfolders 'mine': give the path of "
        "one of them."
    )


def test_an_out_dir_below_a_file_and_one_with_a_name_that_is_too_long(tmp_path: Path) -> None:
    stack(tmp_path)
    (tmp_path / "file").touch()
    told = refused(tmp_path, columns=[], out_dir=tmp_path / "file" / "x" / "y")
    assert told == "file: is a file. file/x/y cannot be in it."
    name = "o" * 252
    assert refused(tmp_path, columns=[], out_dir=tmp_path / name) == (
        f"{name}: could not be written ([Errno 36] File name too long). Nothing is in it that was not before. Make "
        "room, see to the disk, or give another out_dir."
    )


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    stack(tmp_path)
    assert refused(tmp_path, columns=[], out_dir="/proc/nothing/out") == (
        "/proc/nothing/out: could not be written ([Errno 2] No such file or directory: '/proc/nothing'). Nothing is in "
        "it that was not before. Make room, see to the disk, or give another out_dir."
    )


def test_links_that_lead_nowhere_or_in_a_circle(tmp_path: Path) -> None:
    stack(tmp_path)
    (tmp_path / "base" / "link").symlink_to(tmp_path / "nothing")
    told = refused(tmp_path)
    assert told == "base/link: is a broken link, or no file and no folder. Remove it from the base."
    (tmp_path / "base" / "link").unlink()
    (tmp_path / "base" / "link").symlink_to(tmp_path / "base")
    told = refused(tmp_path)
    assert told == "base/link: is a link to a folder that it is in. Remove it from the base."
    (tmp_path / "base" / "link").unlink()
    os.mkfifo(tmp_path / "base" / "pipe")
    with pytest.raises(CheckpointError, match=r"pipe: is a broken link, or no file and no folder"):
        hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def header(file: Path, change: Any) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


DAMAGE: dict[str, tuple[Any, str]] = {
    "cut": (cut, r"its header tells of \d+ bytes, and it has \d+"),
    "empty": (lambda file: file.write_bytes(b""), "its header of 0 bytes cannot be read"),
    "text": (lambda file: file.write_bytes(b"some text that is no header"), r"its header of \d+ bytes cannot be read"),
    "a gap": (
        lambda file: header(file, lambda entries: entries.pop(min(entries, key=lambda k: (k[0] == "_", k)))),
        r"'0\.weight' begins at byte \d+, and what is before it ends at \d+",
    ),
    "a shape": (lambda file: header(file, lambda e: e["0.bias"].update(shape=[9])), "its header of"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file(tmp_path: Path, what: str) -> None:
    stack(tmp_path)
    act, reason = DAMAGE[what]
    act(tmp_path / "base" / "model-00001-of-00003.safetensors")
    told = refused(tmp_path, columns=[])
    start = "base/model-00001-of-00003.safetensors: is cut short or damaged, or is no safetensors file"
    assert re.match(rf"{re.escape(start)} \(.*{reason}.*\)\. Fetch it again\.$", told), told


def test_an_index_that_does_not_fit(tmp_path: Path) -> None:
    stack(tmp_path)
    index = tmp_path / "base" / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]

    def told(entries: Any) -> str:
        index.write_text(json.dumps(entries))
        return refused(tmp_path, columns=[])

    first, shown = "model-00001-of-00003.safetensors", "base/model.safetensors.index.json"
    assert told({"weight_map": places | {"x": "y.safetensors"}}) == (
        f"{shown}: it names 'y.safetensors', and there is no such file beside it. Fetch it again."
    )
    assert told({"weight_map": places | {"x": first}}) == (
        f"{shown}: it has 'x' in {first!r}, which does not hold it. Fetch both again."
    )
    assert told({"weight_map": {key: place for key, place in places.items() if key != "0.bias"}}) == (
        f"{shown}: it lists 5 tensors, and its files hold 6. Fetch them again."
    )
    assert told([]).startswith(f"{shown}: cannot be read, or has no weight_map (")


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    stack(tmp_path)
    (tmp_path / "base" / "config.json").write_text("[1]")
    assert re.match(r"base/config\.json: is no JSON object \(.*\)\. Fetch it again\.$", refused(tmp_path))


@pytest.mark.parametrize(
    ("build", "target", "columns", "stored", "said", "told"),
    [
        (made.gpt2, "c_proj", [], "transformer.h.0.attn.c_proj", "(out, in)", "(in, out)"),
        (made.gpt2, "c_proj", ["c_attn"], "transformer.h.0.attn.c_proj", "(out, in)", "(in, out)"),
        (made.llama, "q_proj", ["q_proj"], "model.layers.0.self_attn.q_proj", "(in, out)", "(out, in)"),
    ],
)
def test_columns_that_are_not_those_of_the_model(
    tmp_path: Path, build: Any, target: str, columns: list[str], stored: str, said: str, told: str
) -> None:
    """A square weight would be turned from the wrong side, with the lengths of rows that `verify` finds."""
    model = build()
    made.base_of(model, tmp_path / "base")
    made.adapter_of(model, tmp_path / "adapter", target)
    message = refused(tmp_path, columns=columns, verify=True)
    start = f"base/model.safetensors: {stored}.weight is given as stored {said}, and config.json is of a model that "
    assert message == f"{start}stores it {told}. Leave columns out, or correct config.json."
