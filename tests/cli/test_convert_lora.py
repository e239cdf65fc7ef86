"""`convert --to lora` and `--to gguf`: PEFT's LoRA computes what the adapted model computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import diffusers
import gguf
import peft
import pytest
import torch
from checkpoint.disk import made
from cli.conftest import Shelf
from cli.shell import Answer, answer, mistake, picture, usage
from diffusion_models import unet
from oracles import relative_error
from safetensors.torch import load_file
from torch import Tensor

import hra_fx

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(3, 15).view(2, 6)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def base(shelf: Shelf) -> torch.nn.Module:
    return copy.deepcopy(shelf.model).double()


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.eval()(input_ids=IDS).logits
    return output


def adapted(shelf: Shelf, *names: str) -> Tensor:
    model = base(shelf)
    for name in names:
        model = hra_fx.fold(hra_fx.load_adapter(model, shelf / name))
    return logits(model)


def test_the_logits_of_peft_are_those_of_the_adapted_model(shelf: Shelf, tmp_path: Path) -> None:
    names = ("my-adapter", "second")
    words = ("convert", *(shelf / name for name in names), tmp_path, "--to", "lora", "--base", shelf / "my-model")
    text = answer(*words)
    assert text.startswith(f"{tmp_path}: 6 layers as LoRA of rank 6 (peft, float32)\n  rounding error up to ")
    wanted, before = adapted(shelf, *names), logits(base(shelf))
    lora = logits(peft.PeftModel.from_pretrained(base(shelf), tmp_path))
    assert relative_error(lora - before, wanted - before) < 1e-5


def test_options_of_the_factors(shelf: Shelf, tmp_path: Path) -> None:
    where = ("--to", "lora", "--base", shelf / "my-model", "-q")
    done = Answer("convert", shelf / "my-adapter", shelf / "second", tmp_path / "a", *where, "--rank-pattern", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["path"] == (tmp_path / "a").as_posix() and done.json["format"] == "peft"
    assert {row["path"].rpartition(".")[2]: row["rank"] for row in done.json["rows"]} == {
        "q_proj": 6,
        "v_proj": 4,
        "o_proj": 2,
    }
    assert set(json.loads((tmp_path / "a" / CONFIG).read_text())["rank_pattern"].values()) == {4, 2}
    answer("convert", shelf / "my-adapter", tmp_path / "b", *where, "--rank", 2, "--dtype", "bfloat16", "--rows")
    tensors = load_file(tmp_path / "b" / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {2}
    said = mistake("convert", shelf / "my-adapter", tmp_path / "c", *where, "--columns", "q_proj")
    assert "is (out, in) according to config.json, but (in, out) according to columns (--columns, --rows)" in said


def test_what_a_server_does_not_accept(shelf: Shelf, tmp_path: Path) -> None:
    made.adapter_of(shelf.model, tmp_path / "head", "q_proj", modules_to_save=["lm_head"])
    words = ("convert", tmp_path / "head", tmp_path / "out", "--to", "lora", "--base", shelf / "my-model")
    assert "modules_to_save" in answer(*words, "--check", "vllm")
    assert "vllm" in mistake(*words, "--check", "apache", "--overwrite")


def test_a_fresh_adapter_is_named(shelf: Shelf, tmp_path: Path) -> None:
    fresh = hra_fx.transform(base(shelf), hra_fx.HRAConfig(r=2, target_modules=["q_proj"]))
    hra_fx.save_adapter(fresh, tmp_path / "fresh")
    done = Answer("convert", tmp_path / "fresh", tmp_path / "out", "--to", "lora", "--base", shelf / "my-model")
    assert done.code == 0 and "\n  warning: the adapters do not change any weight (untrained" in done.out


def test_a_part_of_a_pipeline_becomes_a_file_of_diffusers(tmp_path: Path) -> None:
    made.base_of(unet(), tmp_path / "pipe" / "unet", torch.float32)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    adapter = made.adapter_of(unet(), tmp_path / "adapter", "to_q", "conv1")
    words = ("convert", adapter, tmp_path / "out", "--to", "lora", "--base")
    assert mistake(*words, tmp_path / "pipe").endswith("Give the folder of the adapted part, one of unet.")
    assert "(diffusers, float32)" in answer(*words, tmp_path / "pipe" / "unet")
    model = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "pipe" / "unet")
    hra_fx.save_as_lora(hra_fx.load_adapter(model, adapter), tmp_path / "memory")
    ours, due = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("out", "memory"))
    assert ours.keys() == due.keys()
    for key in (key for key in due if "lora_A" in key):
        one, other = (x[key.replace("_A", "_B")].flatten(1) @ x[key].flatten(1) for x in (ours, due))
        assert relative_error(one, other) < 1e-6
    assert "already contains an adapter" in mistake(*words, tmp_path / "pipe" / "unet")
    answer(*words, tmp_path / "pipe" / "unet", "--overwrite")


def changes_in(file: Path) -> dict[str, Tensor]:
    """`B A` of each tensor of the base, up to the order of rows."""
    factors = {tensor.name: torch.tensor(tensor.data).double() for tensor in gguf.GGUFReader(file).tensors}
    names = {name.rpartition(".")[0] for name in factors}
    return {name: factors[f"{name}.lora_b"] @ factors[f"{name}.lora_a"] for name in names}


def test_a_gguf_file(shelf: Shelf, tmp_path: Path) -> None:
    out = tmp_path / "adapter.gguf"
    words = ("convert", shelf / "my-adapter", out, "--to", "gguf", "--base", shelf / "my-model")
    assert answer(*words).startswith(f"{out}: 4 layers as LoRA of rank 4 (gguf, float32)")
    assert set(changes_in(out)) == {f"blk.{i}.attn_{name}.weight" for i in range(2) for name in "qv"}
    hra_fx.save_as_lora(hra_fx.load_adapter(base(shelf), shelf / "my-adapter"), tmp_path / "memory.gguf")
    changes, due = (changes_in(file) for file in (out, tmp_path / "memory.gguf"))
    assert changes.keys() == due.keys()
    assert all(relative_error(changes[name], due[name]) < 1e-6 for name in due)
    before = out.read_bytes()
    assert mistake(*words) == f"{out}: the file exists. Choose another name, or --overwrite."
    answer(*words, "--overwrite", "--dtype", "float16")
    assert len(out.read_bytes()) < len(before)


#: Arguments after the adapter and the output folder -> a part of the usage error.
WRONG: dict[tuple[str, ...], str] = {
    ("out", "--to", "lora"): "Invalid value for --base: --to lora needs the folder of the base model",
    ("out.gguf", "--to", "gguf"): "Invalid value for --base: --to gguf needs the folder of the base model",
    ("out.gguf", "--to", "lora", "--base", "x"): "Invalid value for OUT: --to lora writes a folder",
    (
        "out",
        "--to",
        "gguf",
        "--base",
        "x",
    ): "Invalid value for OUT: --to gguf writes a .gguf file",
    ("out.gguf", "--to", "gguf", "--base", "x", "--rank-pattern"): "Invalid value for --rank-pattern: a GGUF adapter",
    ("out", "--to", "lora", "--base", "x", "--rank", "0"): "Invalid value for '--rank'",
    ("out", "--to", "lora", "--base", "x", "--dtype", "int8"): "Invalid value for '--dtype'",
    ("more", "out", "--to", "peft"): "Invalid value for ADAPTER: --to peft converts one adapter, got 2",
    ("out", "--to", "hra_fx", "--base", "x"): "Invalid value for --base: is an option of --to lora and --to gguf",
    ("out", "--to", "peft", "--rank-pattern"): "Invalid value for --rank-pattern: is an option of --to lora",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_options_that_do_not_fit_together(shelf: Shelf, words: tuple[str, ...]) -> None:
    assert WRONG[words] in usage("convert", shelf / "my-adapter", *words)


def test_nothing_is_written_after_an_error(shelf: Shelf, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("convert", shelf / "my-adapter", out, "--to", "lora", "--base")
    assert mistake(*words, tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such folder.")
    assert not out.exists()
    before = picture(shelf / "second")
    said = mistake("convert", shelf / "my-adapter", shelf / "second", "--to", "lora", "--base", shelf / "my-model")
    assert said == f"{shelf / 'second'}: already contains an adapter. Choose another folder, or --overwrite."
    assert picture(shelf / "second") == before
