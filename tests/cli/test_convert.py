"""`convert`: PEFT loads the result with the same outputs; in the other direction it equals that of `save_adapter`."""

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
from cli.shell import Answer, answer, mistake, picture, usage
from moe_models import TARGETS, built
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import hra_fx

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(3, 15).view(2, 6)
WEIGHTS = "adapter_model.safetensors"


def plain(shelf: Shelf) -> Any:
    return copy.deepcopy(shelf.model).float()


def by_peft(shelf: Shelf, folder: Path) -> Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(plain(shelf), folder)(input_ids=IDS).logits


def by_us(shelf: Shelf, folder: Path) -> Tensor:
    with torch.no_grad():
        return hra_fx.load_adapter(plain(shelf), folder)(input_ids=IDS).logits


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("name", ["my-adapter", "second", "orthonormal"])
def test_peft_computes_the_same_with_plain_reflections(shelf: Shelf, tmp_path: Path, name: str) -> None:
    answer("convert", shelf / name, tmp_path, "--to", "peft")
    torch.testing.assert_close(by_peft(shelf, tmp_path), by_us(shelf, shelf / name), rtol=1e-4, atol=1e-4)
    assert metadata(tmp_path) == {"format": "pt"}
    tensors = load_file(tmp_path / WEIGHTS)
    assert {key.rpartition(".")[2] for key in tensors} == {"hra_u"}
    config = hra_fx.HRAConfig.from_pretrained(tmp_path)
    assert not config.apply_GS and {u.shape[1] for u in tensors.values()} == {config.r}


def test_what_is_said_of_an_anchor(shelf: Shelf, tmp_path: Path) -> None:
    text = answer("convert", shelf / "orthonormal", tmp_path, "--to", "peft")
    assert f"HRA adapter in {tmp_path}, in the format of PEFT" in text
    assert "reflections  4 in each of 4 layers, 2 of them previously frozen" in text
    assert "dropped      4 tensors" in text
    done = Answer("convert", shelf / "orthonormal", tmp_path, "--to", "peft", "--overwrite", "--json").json
    assert (done["form"], done["layers"], done["r"], done["anchor"]) == ("peft", 4, 4, 2)
    assert done["dropped"][0].endswith("hra_vectors")


def of_peft(shelf: Shelf, folder: Path, **fields: Any) -> Path:
    torch.manual_seed(0)
    fields = {"r": 4, "target_modules": ["q_proj"], "init_weights": False} | fields
    peft.get_peft_model(plain(shelf), peft.HRAConfig(**fields)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fields", [{}, {"apply_GS": True}, {"modules_to_save": ["lm_head"]}])
def test_from_peft_it_is_what_save_adapter_writes(shelf: Shelf, tmp_path: Path, fields: dict[str, Any]) -> None:
    source = of_peft(shelf, tmp_path / "peft", **fields)
    answer("convert", source, tmp_path / "ours", "--to", "hra_fx")
    torch.testing.assert_close(by_us(shelf, tmp_path / "ours"), by_peft(shelf, source), rtol=1e-4, atol=1e-4)
    hra_fx.save_adapter(hra_fx.load_adapter(plain(shelf), source), tmp_path / "saved")
    ours, saved = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "saved"))
    assert ours.keys() == saved.keys() and all(torch.equal(ours[key], saved[key]) for key in saved)
    assert Answer("inspect", tmp_path / "ours", "--json").json["written_by"] == "hra_fx"


def test_to_us_an_anchor_stays(shelf: Shelf, tmp_path: Path) -> None:
    answer("convert", shelf / "orthonormal", tmp_path, "--to", "hra_fx")
    source = shelf / "orthonormal"
    assert (tmp_path / "adapter_config.json").read_text() == (source / "adapter_config.json").read_text()
    assert (tmp_path / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    assert "hra_fx" in metadata(tmp_path)


def test_keys_without_the_prefix_get_it(shelf: Shelf, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = made.stack_adapter(tmp_path / "bare", layers=1)
    vectors = load_file(folder / WEIGHTS)
    save_file({key.removeprefix("base_model.model."): u for key, u in vectors.items()}, folder / WEIGHTS)
    answer("convert", folder, tmp_path / "out", "--to", "peft")
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == vectors.keys()


#: File in the output folder -> the refusal, and whether --overwrite helps.
PRESENT: dict[str, tuple[str, bool]] = {
    "adapter_config.json": ("already contains an adapter. Choose another folder, or --overwrite.", True),
    "notes.txt": ("is not empty (it contains notes.txt). Choose another folder, or --overwrite.", True),
    **{
        name: (
            f"contains a model ({name}), and from_pretrained would load the adapter with it. Choose another folder.",
            False,
        )
        for name in ("config.json", "model_index.json", "model-00001-of-00002.safetensors")
    },
}


@pytest.mark.parametrize("name", PRESENT)
def test_an_output_folder_with_other_files(shelf: Shelf, tmp_path: Path, name: str) -> None:
    message, replaceable = PRESENT[name]
    (tmp_path / name).write_text("{}")
    words = ("convert", shelf / "my-adapter", tmp_path, "--to", "peft")
    for refused in (words,) if replaceable else (words, (*words, "--overwrite")):
        assert mistake(*refused) == f"{tmp_path}: {message}"
        assert picture(tmp_path) == {name: b"{}"}
    if replaceable:
        answer(*words, "--overwrite")
        assert (tmp_path / name).exists() and (tmp_path / WEIGHTS).exists()
    else:
        out = tmp_path / name
        assert mistake("convert", shelf / "my-adapter", out, "--to", "peft").startswith(f"{out}: is a file.")


def test_what_is_left_out_of_the_configuration_is_named(shelf: Shelf, tmp_path: Path) -> None:
    source = shutil.copytree(shelf / "my-adapter", tmp_path / "in")
    file = source / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_version": "0.99", "of_tomorrow": 1, "more": []}))
    text = answer("convert", source, tmp_path / "out", "--to", "peft")
    assert "dropped      configuration fields more, of_tomorrow, peft_version" in text
    done = Answer("convert", source, tmp_path / "out", "--to", "hra_fx", "--overwrite", "--json").json
    assert done["fields"] == ["more", "of_tomorrow", "peft_version"]


def test_a_form_that_is_none(shelf: Shelf, tmp_path: Path) -> None:
    said = usage("convert", shelf / "my-adapter", tmp_path, "--to", "dora")
    assert all(f"'{form}'" in said for form in ("lora", "gguf", "peft", "hra_fx"))
    assert "Missing option '--to'" in usage("convert", shelf / "my-adapter", tmp_path)


def test_experts_have_no_form_for_peft(tmp_path: Path) -> None:
    adapter = made.adapter_of(built("qwen3_moe"), tmp_path / "adapter", "q_proj", target_parameters=TARGETS)
    assert mistake("convert", adapter, tmp_path / "out", "--to", "peft") == (
        f"{adapter / WEIGHTS}: the adapter is on parameters of experts (target_parameters={TARGETS}), which PEFT's HRA "
        "does not support. Use --to lora."
    )
    answer("convert", adapter, tmp_path / "out", "--to", "hra_fx")
    found, wanted = (load_file(folder / WEIGHTS) for folder in (tmp_path / "out", adapter))
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)
