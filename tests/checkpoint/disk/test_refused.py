"""Errors of a fold on disk name the file and the reason, and nothing is written."""

from __future__ import annotations

import json
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
    """Return a function that adds tensors to the adapter of a stack or replaces all, and edits its configuration."""

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
    """A row with a norm above the largest float16 is rotated onto one axis. No entry of the base is that large."""
    vector = torch.full((6, 1), 1 / 6**0.5)
    vector[0] -= 1
    one_layer(folder, torch.full((2, 6), 60000.0).half(), vector)


def shared_tensor(folder: Path) -> None:
    one_layer(folder, torch.ones(8, 6), torch.ones(6, 2), "head.weight")
    model: Any = nn.ModuleDict({"body": nn.Linear(6, 8), "head": nn.Linear(6, 8)})
    model["head"].weight = model["body"].weight
    save_model(model, str(folder / "base" / "model.safetensors"))


def adapter_in_the_base(folder: Path) -> None:
    stack(folder)
    hra_fx.HRAConfig(target_modules=["0"]).save_pretrained(folder / "base")


def only_a_pickle(folder: Path) -> None:
    made.stack_adapter(folder / "adapter")
    (folder / "base").mkdir()
    (folder / "base" / "pytorch_model.bin").write_bytes(b"\x80\x04")


def in_a_subfolder(folder: Path) -> None:
    made.stack_adapter(folder / "adapter")
    made.linear_stack(folder / "base" / "unet")


def broken_link(folder: Path) -> None:
    stack(folder)
    (folder / "base" / "link").symlink_to(folder / "nothing")


def damaged(folder: Path) -> None:
    stack(folder)
    (folder / "base" / "model-00001-of-00003.safetensors").write_bytes(b"some text that is not a header")


def indexed(place: str) -> Callable[[Path], None]:
    """A base with an index that has one more key, in the file `place`."""

    def arrange(folder: Path) -> None:
        stack(folder)
        places = json.loads((folder / INDEX).read_text())["weight_map"]
        (folder / INDEX).write_text(json.dumps({"weight_map": places | {"x": place}}))

    return arrange


FIRST = "base/model-00001-of-00003.safetensors"
#: How the folders are arranged, and the start of the message.
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown layer": (
        with_tensors({"block.7.hra_u": torch.ones(6, 2)}),
        f"{FILE}: the adapter changes block.7.weight, which is not in {INDEX}. Was it trained on another base model",
    ),
    "missing layer": (
        with_tensors({f"{i}.hra_u": torch.ones(6, 2) for i in range(2)}, instead=True),
        f"{FILE}: the file has no vectors for 2, which the configuration names. Was the adapter trained on another",
    ),
    "other width": (
        with_tensors({f"{i}.hra_u": torch.ones(5, 2) for i in range(3)}),
        f"{FIRST}: 0.weight of shape (8, 6) has 6 inputs, but the adapter's vectors of 0 have length 5.",
    ),
    "other rank": (
        with_tensors({"0.hra_u": torch.ones(6, 2)}, r=5),
        f"{FILE}: {U.format('0')} must have shape (d, 5), got (6, 2): the configuration says r=5. The two files are",
    ),
    "no vectors": (
        with_tensors({"0.bias": torch.ones(8)}, instead=True),
        f"{FILE}: no vectors found (keys that end in 'hra_u'). Save the adapter again.",
    ),
    "unexpected key": (
        with_tensors({"0.scale": torch.ones(3)}),
        f"{FILE}: unexpected key 0.scale, which is not in modules_to_save or in {INDEX}. Was the adapter",
    ),
    "other head": (
        other_head,
        "base/model.safetensors: classifier.bias is BF16 of shape (2,), but the adapter's classifier.bias is "
        "torch.float32 of shape (5,). Was it trained on another base model?",
    ),
    "8-bit floats": (
        lambda folder: one_layer(folder, torch.zeros(8, 6).to(torch.float8_e4m3fn), torch.ones(6, 2)),
        "base/model.safetensors: 0.weight must be BF16, F16, F32, F64 with at least two dimensions, got F8_E4M3 of",
    ),
    "shared tensor": (shared_tensor, "base/model.safetensors: head.weight shares its tensor with another one, and the"),
    "adapter in the base": (
        adapter_in_the_base,
        "base/adapter_config.json: there is an adapter in the base model's folder, and",
    ),
    "only a pickle": (
        only_a_pickle,
        "base/pytorch_model.bin: only safetensors files are read. Load the model and save",
    ),
    "in a subfolder": (
        in_a_subfolder,
        "base: no .safetensors files found. The subfolders 'unet' have some: pass one of them, or adapter_dir={name:",
    ),
    "broken link": (broken_link, "base/link: is a broken link, or not a regular file. Remove it from the base."),
    "damaged file": (damaged, f"{FIRST}: truncated, damaged, or not a safetensors file ("),
    "missing file": (indexed("y.safetensors"), f"{INDEX}: lists 'x' in 'y.safetensors', but the file is missing or"),
    "missing key": (indexed(FIRST[5:]), f"{INDEX}: lists 'x' in {FIRST[5:]!r}, but the file is missing or does not"),
}
#: The same, of errors of the fold itself.
FOLDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "dependent vectors": (
        with_tensors({"0.hra_u": torch.ones(6, 2)}, apply_GS=True),
        f"{FILE}: {U.format('0')}: its 2 vectors of length 6 are linearly dependent, so Gram-Schmidt is not defined.",
    ),
    "tied in an unknown model": (
        tied_in_an_unknown_model,
        "base/config.json: tie_word_embeddings is True, but transformers does not support this model, so it is "
        "unknown which tensors are tied to embed.weight. Load the model instead",
    ),
    "overflow": (overflow, "base/model.safetensors: the folded 0.weight is not finite in F16. Check the base weight"),
}


@pytest.mark.parametrize("case", [*CASES, *FOLDS])
def test_message(tmp_path: Path, case: str) -> None:
    arrange, message = (CASES | FOLDS)[case]
    arrange(tmp_path)
    columns = None if (tmp_path / "base" / "config.json").exists() else []
    found = refused(tmp_path, kind=FoldError if case in FOLDS else CheckpointError, columns=columns)
    assert found.startswith(message)


def test_a_square_weight_of_an_unknown_model(tmp_path: Path) -> None:
    one_layer(tmp_path, torch.randn(6, 6), torch.randn(6, 2))
    message = refused(tmp_path)
    assert message.startswith("base/model.safetensors: 0.weight is square, (6, 6), and the folder has no config.json")
    assert "Pass columns=[] (--rows) if every weight is (out, in), or columns=[names] (--columns NAME) to" in message
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
    assert refused(tmp_path, [first, second]).startswith(
        "b/adapter_model.safetensors: classifier.bias is trained by this adapter and by an earlier one"
    )
    third = made.adapter_of(model, tmp_path / "c", "classifier")
    assert refused(tmp_path, [first, third]).startswith(
        "base/model.safetensors: one adapter rotates classifier.weight, and another one replaces it (modules_to_save)."
    )


def test_embeddings_of_another_base(tmp_path: Path) -> None:
    model = made.llama()
    made.base_of(model, tmp_path / "base")
    made.adapter_of(model, tmp_path / "adapter", "q_proj", "lm_head")
    own = made.tensors(tmp_path / "base")["lm_head.weight"]
    add(tmp_path, **{"base_model.model.lm_head.base_layer.weight": own.float()})
    assert hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "fits").rotated
    add(tmp_path, **{"base_model.model.lm_head.base_layer.weight": own.float() + 1})
    assert refused(tmp_path).startswith(
        f"{FILE}: lm_head.weight of shape (37, 16) is a copy of the base model's embeddings, but lm_head.weight of "
        "shape (37, 16) in base/model.safetensors has other values."
    )


#: Arguments, as names of folders, and the start of the message.
ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"out_dir": "base/inside"}, "base/inside: the output folder overlaps with the base, base. Choose a folder outs"),
    ({"out_dir": "."}, "TMP: the output folder overlaps with the base, base."),
    ({"out_dir": "adapter"}, "adapter: the output folder overlaps with adapter adapter, adapter."),
    ({"out_dir": "full"}, "full: the output folder is not empty. Choose another folder, or pass overwrite=True"),
    ({"out_dir": "full/file", "overwrite": True}, "full/file: is a file. Choose another output folder."),
    (
        {"out_dir": "full/file/x/y"},
        "full/file/x/y: cannot write the result ([Errno 20] Not a directory). The output folder",
    ),
    ({"out_dir": "o" * 252}, f"{'o' * 252}: cannot write the result ([Errno 36] File name too long)."),
    ({"base_dir": "none"}, "none: no such folder. Pass one with config.json and safetensors files, such as"),
    ({"adapter": []}, "adapter_dir must name at least one adapter. Pass one or more folders, in order."),
    ({"adapter": {"": None}}, "adapter_dir must name at least one adapter."),
    ({"adapter": {"../adapter": "x"}}, "base: no such subfolder '../adapter' (adapter_dir, --part). It has 'vae'."),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    stack(tmp_path)
    for folder in ("base/vae", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "file").touch()
    paths = {name: tmp_path / value if name.endswith("_dir") else value for name, value in arguments.items()}
    assert refused(tmp_path, columns=[], **paths).startswith(message)


def test_an_adapter_for_a_part_that_the_pipeline_does_not_have(tmp_path: Path) -> None:
    for name in ("unet", "text_encoder"):
        made.linear_stack(tmp_path / "base" / name)
    (tmp_path / "base" / "model_index.json").write_text("{}")
    for name in ("unet", "text_encoder_2"):
        made.stack_adapter(tmp_path / "adapter" / name)
    end = "the pipeline base has no part for this adapter. Name the part: adapter_dir={'unet': "
    assert refused(tmp_path, "user/name").startswith(f"user/name: {end}")
    assert refused(tmp_path).startswith(f"adapter/text_encoder_2: {end}")
    shutil.move(tmp_path / "adapter" / "text_encoder_2" / "adapter_config.json", tmp_path / "adapter")
    assert refused(tmp_path).startswith(f"adapter: {end}")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    report = hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", columns=[])
    assert report.rotated == ("unet/0.weight", "unet/1.weight", "unet/2.weight")


def test_columns_do_not_contradict_the_model(tmp_path: Path) -> None:
    """A square weight would be rotated from the wrong side, which `verify` cannot detect."""
    model = made.gpt2()
    made.base_of(model, tmp_path / "base")
    made.adapter_of(model, tmp_path / "adapter", "c_proj")
    for name, columns in (("out", None), ("other", [])):
        hra_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / name, columns=columns)
    assert made.picture(tmp_path / "out") == made.picture(tmp_path / "other")
