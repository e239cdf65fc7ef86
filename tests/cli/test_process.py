"""`hra-fx` in processes of its own: in a process that has imported other things, missing imports are not seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from cli.conftest import Shelf
from safetensors.torch import save_file

ADAPTER, MODEL = "my-adapter", "my-model"
#: Arguments -> exit code, and a part of stdout or, of an error, of stderr, which is one line.
CALLS: dict[tuple[str, ...], tuple[int, str]] = {
    ("match", MODEL, "-t", "q_proj", "--json"): (0, '{\n  "model": "LlamaForCausalLM",'),
    ("match", MODEL, "-t", "qproj"): (1, "does not match: `target_modules=['qproj']` matches no module of Llama"),
    ("inspect", "empty"): (2, "error: empty/adapter_model.safetensors: no vectors found (keys that end in "),
    ("fold", MODEL, ADAPTER, "folded"): (0, "folded: 4 layers rotated"),
    ("convert", ADAPTER, "lora", "--to", "lora", "--base", MODEL): (0, "lora: 4 layers as LoRA of rank 4 (peft)"),
}


@pytest.fixture(scope="module")
def processes(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], subprocess.Popen[str]]:
    """One process for each call, all at the same time: most of their time is that of imports."""
    here = tmp_path_factory.mktemp("here")
    for name in (ADAPTER, MODEL):
        shutil.copytree(shelf / name, here / name)
    shutil.copytree(shelf / ADAPTER, here / "empty")
    save_file({"base_model.model.lm_head.bias": torch.ones(3)}, here / "empty" / "adapter_model.safetensors")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    program = (sys.executable, "-m", "hra_fx")
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # a pipe has no width
    return {words: subprocess.Popen([*program, *words], cwd=here, env=env, text=True, **streams) for words in CALLS}


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_exit_codes_and_lines(words: tuple[str, ...], processes: dict[tuple[str, ...], subprocess.Popen[str]]) -> None:
    process, (code, start) = processes[words], CALLS[words]
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    said, other = (err, out) if code else (out, err)
    assert other == ""
    assert start in said and (not code or said.count("\n") == 1)
