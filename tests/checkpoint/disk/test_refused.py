"""What a fold on disk refuses: the full message, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.disk import made
from checkpoint.disk.made import add, refused, rewrite, stack
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import CheckpointError, FoldError

FILE = "adapter/adapter_model.safetensors"
INDEX = "base/model.safetensors.index.json"
IN_MEMORY = "Load the model instead: hra_fx.load_adapter, then hra_fx.fold or hra_fx.save_as_lora."
OTHER_BASE = "Was the adapter trained on another base model"
U = "base_model.model.{}.hra_u"


def one_layer(folder: Path, weight: Tensor, vectors: Tensor, name: str = "0.weight") -> None:
    """A base with one weight, and an adapter of its layer."""
    (folder / "base").mkdir()
    save_file({name: weight}, folder / "base" / "model.safetensors")
    path = name.rpartition(".")[0]
    made.stack_adapter(folder / "adapter", layers=1, r=vectors.shape[1])
    save_file({U.format(path): vectors}, folder / FILE)
    rewrite(folder, target_modules=[path])


def with_tensors(tensors: dict[str, Tensor], *, instead: bool = False, **config: Any) -> Callable[[Path], None]:
    """What adds tensors to the adapter of a stack, or replaces all, and changes its configuration."""

    def arrange(folder: Path) -> None:
        stack(folder)
        rewrite(folder, **config)
        keys = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
        save_file(keys, folder / FILE) if instead else add(folder, **keys)

    return arrange


def tied_in_an_unknown_model(folder: Path) -> None:
    one_layer(folder, torch.ones(9, 6), torch.ones(6, 2), "embed.weight")
    (folder / "base" / "config.json").write_text('{"model_type": "of mine", "tie_word_embeddings": true}')


def other_head(folder: Path) -> None:
    made.base_of(made.bert("BertForSequenceClassification", num_labels=2), folder / "base")
    model = made.bert("BertForSequenceClassification", num_labels=5)
    made.adapter_of(model, folder / "adapter", "query", modules_to_save=["classifier"])


def overflow(folder: Path) -> None:
    """A row whose norm exceeds the largest float16 is rotated onto one axis; no entry of the base does."""
    vector = torch.full((6, 1), 1 / 6**0.5)
    vector[0] -= 1
    one_layer(folder, torch.full((2, 6), 60000.0).half(), vector)


def shared_tensor(folder: Path) -> None:
    one_layer(folder, torch.ones(8, 6), torch.ones(6, 2), "head.weight")
    model: Any = nn.ModuleDict({"body": nn.Linear(6, 8), "head": nn.Linear(6, 8)})
    model["head"].weight = model["body"].weight
    save_model(model, str(folder / "base" / "model.safetensors"))


#: How the folders are arranged, and the message.
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown layer": (
        with_tensors({"block.7.hra_u": torch.ones(6, 2)}),
        f"{FILE}: the adapter changes block.7.weight, which is not in {INDEX}. Similar names: 2.weight, 1.weight, "
        "0.weight. Was it trained on another base model, or on one that transformers loads under other names? "
        + IN_MEMORY,
    ),
    "missing layer": (
        with_tensors({f"{i}.hra_u": torch.ones(6, 2) for i in range(2)}, instead=True),
        f"{FILE}: the file has no vectors for 2, which the configuration names. {OTHER_BASE} than {INDEX}, or its "
        "configuration edited?",
    ),
    "other width": (
        with_tensors({f"{i}.hra_u": torch.ones(5, 2) for i in range(3)}),
        "base/model-00001-of-00003.safetensors: 0.weight of shape (8, 6) has 6 inputs, but the adapter's vectors of 0 "
        f"have length 5. {OTHER_BASE}?",
    ),
    "other rank": (
        with_tensors({"0.hra_u": torch.ones(6, 2)}, r=5),
        f"{FILE}: {U.format('0')} must have shape (d, 5), got (6, 2): the configuration says r=5. The two files are "
        "from different adapters; save it again.",
    ),
    "no vectors": (
        with_tensors({"0.bias": torch.ones(8)}, instead=True),
        f"{FILE}: no vectors found (keys that end in 'hra_u'). Save the adapter again.",
    ),
    "unexpected key": (
        with_tensors({"0.scale": torch.ones(3)}),
        f"{FILE}: unexpected key 0.scale, which is not in modules_to_save or in {INDEX}. No name is similar. "
        f"{OTHER_BASE}?",
    ),
    "other head": (
        other_head,
        "base/model.safetensors: classifier.bias is BF16 of shape (2,), but the adapter's classifier.bias is "
        "torch.float32 of shape (5,). Was it trained on another base model?",
    ),
    "8-bit floats": (
        lambda folder: one_layer(folder, torch.zeros(8, 6).to(torch.float8_e4m3fn), torch.ones(6, 2)),
        "base/model.safetensors: 0.weight must be BF16, F16, F32, F64 with at least two dimensions, got F8_E4M3 of "
        "shape (8, 6). Use a base model that is not quantized.",
    ),
    "shared tensor": (
        shared_tensor,
        "base/model.safetensors: body.weight and head.weight share one tensor, and the file does not say whether they "
        f"are one layer. {IN_MEMORY}",
    ),
}
#: The same, of errors of the fold itself.
FOLDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "dependent vectors": (
        with_tensors({"0.hra_u": torch.ones(6, 2)}, apply_GS=True),
        f"{FILE}: {U.format('0')}: its 2 vectors of length 6 are linearly dependent, so Gram-Schmidt is not defined. "
        "Train with apply_GS=False, or with init_weights=True in hra_fx, which starts from independent vectors.",
    ),
    "tied in an unknown model": (
        tied_in_an_unknown_model,
        "base/config.json: tie_word_embeddings is True, but transformers does not support this model, so it is "
        f"unknown which tensors are tied to embed.weight. {IN_MEMORY}",
    ),
    "overflow": (
        overflow,
        "base/model.safetensors: the folded 0.weight is not finite in F16. Check the base weight for NaN and inf, or "
        "store the base model in a wider dtype.",
    ),
}


@pytest.mark.parametrize("case", [*CASES, *FOLDS])
def test_message(tmp_path: Path, case: str) -> None:
    arrange, message = (CASES | FOLDS)[case]
    arrange(tmp_path)
    columns = None if (tmp_path / "base" / "config.json").exists() else []
    assert refused(tmp_path, kind=FoldError if case in FOLDS else CheckpointError, columns=columns) == message


def test_a_square_weight_of_an_unknown_model(tmp_path: Path) -> None:
    one_layer(tmp_path, torch.randn(6, 6), torch.randn(6, 2))
    assert refused(tmp_path) == (
        "base/model.safetensors: 0.weight is square, (6, 6), and the folder has no config.json of a transformers, "
        "diffusers or timm model, so the layout is ambiguous: (out, in), or (in, out) as in GPT-2. Pass columns=[] "
        "(--rows) if every weight is (out, in), or columns=[names] (--columns NAME) to name layers that are (in, out)."
    )
    results = {}
    for name, columns in (("rows", []), ("columns", ["0"])):
        hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / name, columns=columns)
        results[name] = made.tensors(tmp_path / name)["0.weight"]
    assert not torch.allclose(results["rows"], results["columns"])


def test_two_adapters_that_replace_the_same_tensor(tmp_path: Path) -> None:
    model = made.bert("BertForSequenceClassification")
    made.base_of(model, tmp_path / "base")
    first, second = (
        made.adapter_of(model, tmp_path / name, "query", modules_to_save=["classifier"]) for name in ("a", "b")
    )
    (tmp_path / "adapter").mkdir()
    assert refused(tmp_path, [first, second]) == (
        "b/adapter_model.safetensors: classifier.bias is trained by this adapter and by an earlier one "
        "(modules_to_save or bias), and only one can replace it. Leave out one of them."
    )
    third = made.adapter_of(model, tmp_path / "c", "classifier")
    assert refused(tmp_path, [first, third]) == (
        "base/model.safetensors: one adapter rotates classifier.weight, and another one replaces it (modules_to_save). "
        "Leave out one of them."
    )


def test_embeddings_of_another_base(tmp_path: Path) -> None:
    model = made.llama()
    made.base_of(model, tmp_path / "base")
    made.adapter_of(model, tmp_path / "adapter", "q_proj", "lm_head")
    own = made.tensors(tmp_path / "base")["lm_head.weight"]
    add(tmp_path, **{"base_model.model.lm_head.base_layer.weight": own.float()})
    assert hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "fits").rotated
    add(tmp_path, **{"base_model.model.lm_head.base_layer.weight": own.float() + 1})
    assert refused(tmp_path) == (
        f"{FILE}: lm_head.weight of shape (37, 16) is a copy of the base model's embeddings, but lm_head.weight of "
        "shape (37, 16) in base/model.safetensors has other values. Use the base model that the adapter was trained on."
    )


# ---- folders and files ----

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


def test_an_adapter_in_the_folder_of_the_base(tmp_path: Path) -> None:
    stack(tmp_path)
    hra_fx.HRAConfig(target_modules=["0"]).save_pretrained(tmp_path / "base")
    assert refused(tmp_path, columns=[]) == (
        "base/adapter_config.json: there is an adapter in the base model's folder, and from_pretrained would load it "
        "on top of the folded weights. Move it to another folder."
    )


@pytest.mark.parametrize("given", [[], {"": None}])
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


@pytest.mark.parametrize("data", [b"", b"some text that is not a header"])
def test_a_damaged_file(tmp_path: Path, data: bytes) -> None:
    stack(tmp_path)
    (tmp_path / "base" / "model-00001-of-00003.safetensors").write_bytes(data)
    start = "base/model-00001-of-00003.safetensors: truncated, damaged, or not a safetensors file"
    assert re.fullmatch(rf"{re.escape(start)} \(.+\)\. Save or download it again\.", refused(tmp_path, columns=[]))


def test_an_index_that_does_not_match_its_files(tmp_path: Path) -> None:
    stack(tmp_path)
    index = tmp_path / "base" / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    first, shown = "model-00001-of-00003.safetensors", INDEX
    for place, message in (
        ("y.safetensors", "lists 'y.safetensors', which is missing from the folder. Download it again."),
        (first, f"lists 'x' in {first!r}, but the file does not have it. Download both again."),
    ):
        index.write_text(json.dumps({"weight_map": places | {"x": place}}))
        assert refused(tmp_path, columns=[]) == f"{shown}: {message}"


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
