"""`convert` writes the same files as the functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint.disk import made
from cli.conftest import Shelf
from cli.shell import Answer, answer, mistake, usage

from hra_fx.lora.save import convert_files

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TAKEN = "already exists. The last path is the output: name a new one. To replace it, pass --overwrite."


def test_an_output_folder_with_other_files(shelf: Shelf, tmp_path: Path) -> None:
    words = ("convert", shelf / "my-adapter", tmp_path, "--to", "lora", "--base", shelf / "my-model")
    (tmp_path / "notes.txt").write_text("mine")
    assert mistake(*words) == f"{tmp_path}: {TAKEN}"
    assert mistake(words[0], words[1], tmp_path / "notes.txt", *words[3:]).endswith(f"notes.txt: {TAKEN}")
    assert mistake(words[0], words[1], shelf / "second", *words[3:]) == f"{shelf / 'second'}: {TAKEN}"  # OUT is missing
    assert made.picture(tmp_path) == {"notes.txt": b"mine"}
    answer(*words, "--overwrite")
    assert made.picture(tmp_path).keys() == {"notes.txt", CONFIG, WEIGHTS}
    (tmp_path / "config.json").write_text("{}")
    for refused in (words, (*words, "--overwrite")):
        assert mistake(*refused).startswith(f"{tmp_path}: contains a model (config.json), and from_pretrained would")


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ([], {}),
        (["--rank", 2, "--dtype", "bfloat16", "--rows"], {"rank": 2, "dtype": "bfloat16", "columns": []}),
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
    assert mistake(*words) == f"{out}: {TAKEN}"
    answer(*words, "--overwrite", "--dtype", "float16")
    assert len(out.read_bytes()) < len(before)


#: Arguments after the adapter and the output folder -> a part of the usage error.
WRONG: dict[tuple[str, ...], str] = {
    ("out", "--to", "peft", "--base", "x"): "Invalid value for '--to': 'peft' is not one of 'lora', 'gguf'.",
    ("out", "--to", "lora"): "Missing option '--base'",
    ("out.gguf", "--to", "lora", "--base", "x"): "Invalid value for OUT: --to lora writes a folder",
    ("out", "--to", "gguf", "--base", "x"): "Invalid value for OUT: --to gguf writes a .gguf file",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_options_that_do_not_fit_together(shelf: Shelf, words: tuple[str, ...]) -> None:
    assert WRONG[words] in usage("convert", shelf / "my-adapter", *words)
