"""Adapters and weights that a fold on disk refuses: the full message, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint.disk import made
from checkpoint.disk.made import add, refused, rewrite, stack
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import FoldError, HRAError

FILE = "adapter/adapter_model.safetensors"
INDEX = "base/model.safetensors.index.json"
IN_MEMORY = "Load the model instead: hra_fx.load_adapter, then hra_fx.fold or hra_fx.save_as_lora."
OTHER_BASE = "Was the adapter trained on another base model"
U = "base_model.model.{}.hra_u"


def base(folder: Path, **tensors: Tensor) -> None:
    (folder / "base").mkdir()
    save_file(tensors, folder / "base" / "model.safetensors")


def one_layer(folder: Path, weight: Tensor, vectors: Tensor, name: str = "0.weight") -> None:
    """A base with one weight, and an adapter of its layer."""
    base(folder, **{name: weight})
    path = name.rpartition(".")[0]
    made.stack_adapter(folder / "adapter", layers=1, r=vectors.shape[1])
    save_file({U.format(path): vectors}, folder / FILE)
    rewrite(folder, target_modules=[path])


def unknown_layer(folder: Path) -> None:
    stack(folder)
    add(folder, **{U.format("block.7"): torch.ones(6, 2)})


def missing_layer(folder: Path) -> None:
    stack(folder)
    file = folder / FILE
    save_file({key: tensor for key, tensor in load_file(file).items() if ".2." not in key}, file)


def other_width(folder: Path) -> None:
    made.linear_stack(folder / "base")
    made.stack_adapter(folder / "adapter", width=5)


def other_rank(folder: Path) -> None:
    stack(folder)
    rewrite(folder, r=5)


def no_vectors(folder: Path) -> None:
    stack(folder)
    save_file({"base_model.model.0.bias": torch.ones(8)}, folder / FILE)


def dependent_vectors(folder: Path) -> None:
    stack(folder)
    rewrite(folder, apply_GS=True)
    add(folder, **{U.format("0"): torch.ones(6, 2)})


def unexpected_key(folder: Path) -> None:
    stack(folder)
    add(folder, **{"base_model.model.0.scale": torch.ones(3)})


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


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(6, 8)
        self.head.weight = self.body.weight


def shared_tensor(folder: Path) -> None:
    one_layer(folder, torch.ones(8, 6), torch.ones(6, 2), "head.weight")
    save_model(Shared(), str(folder / "base" / "model.safetensors"))


SHARED = (
    "base/model.safetensors: body.weight and head.weight share one tensor, and the file does not say whether they are "
    f"one layer. {IN_MEMORY}"
)
#: How the folders are arranged, the type of the error, its message.
CASES: dict[str, tuple[Callable[[Path], None], type[HRAError], str]] = {
    "unknown layer": (
        unknown_layer,
        hra_fx.CheckpointError,
        f"{FILE}: the adapter changes block.7.weight, which is not in {INDEX}. Similar names: 2.weight, 1.weight, "
        "0.weight. Was it trained on another base model, or on one that transformers loads under other names? "
        + IN_MEMORY,
    ),
    "missing layer": (
        missing_layer,
        hra_fx.CheckpointError,
        f"{FILE}: the file has no vectors for 2, which the configuration names. {OTHER_BASE} than {INDEX}, or its "
        "configuration edited?",
    ),
    "other width": (
        other_width,
        hra_fx.CheckpointError,
        "base/model-00001-of-00003.safetensors: 0.weight of shape (8, 6) has 6 inputs, but the adapter's vectors of 0 "
        f"have length 5. {OTHER_BASE}?",
    ),
    "other rank": (
        other_rank,
        hra_fx.CheckpointError,
        f"{FILE}: {U.format('0')} must have shape (d, 5), got (6, 2): the configuration says r=5. The two files are "
        "from different adapters; save it again.",
    ),
    "no vectors": (
        no_vectors,
        hra_fx.CheckpointError,
        f"{FILE}: no vectors found (keys that end in 'hra_u'). Save the adapter again.",
    ),
    "dependent vectors": (
        dependent_vectors,
        FoldError,
        f"{FILE}: {U.format('0')}: its 2 vectors of length 6 are linearly dependent, so Gram-Schmidt is not defined. "
        "Train with apply_GS=False, or with init_weights=True in hra_fx, which starts from independent vectors.",
    ),
    "unexpected key": (
        unexpected_key,
        hra_fx.CheckpointError,
        f"{FILE}: unexpected key 0.scale, which is not in modules_to_save or in {INDEX}. No name is similar. "
        f"{OTHER_BASE}?",
    ),
    "tied in an unknown model": (
        tied_in_an_unknown_model,
        FoldError,
        "base/config.json: tie_word_embeddings is True, but transformers does not support this model, so it is "
        f"unknown which tensors are tied to embed.weight. {IN_MEMORY}",
    ),
    "other head": (
        other_head,
        hra_fx.CheckpointError,
        "base/model.safetensors: classifier.bias is BF16 of shape (2,), but the adapter's classifier.bias is "
        "torch.float32 of shape (5,). Was it trained on another base model?",
    ),
    "overflow": (
        overflow,
        FoldError,
        "base/model.safetensors: the folded 0.weight is not finite in F16. Check the base weight for NaN and inf, or "
        "store the base model in a wider dtype.",
    ),
    "8-bit floats": (
        lambda folder: one_layer(folder, torch.zeros(8, 6).to(torch.float8_e4m3fn), torch.ones(6, 2)),
        hra_fx.CheckpointError,
        "base/model.safetensors: 0.weight must be BF16, F16, F32, F64 with at least two dimensions, got F8_E4M3 of "
        "shape (8, 6). Use a base model that is not quantized.",
    ),
    "shared tensor": (shared_tensor, hra_fx.CheckpointError, SHARED),
}


@pytest.mark.parametrize("case", CASES)
def test_message(tmp_path: Path, case: str) -> None:
    arrange, kind, message = CASES[case]
    arrange(tmp_path)
    columns = None if (tmp_path / "base" / "config.json").exists() else []
    assert refused(tmp_path, kind=kind, columns=columns) == message


def test_a_square_weight_of_an_unknown_model(tmp_path: Path) -> None:
    base(tmp_path, **{"0.weight": nn.Linear(6, 6).weight.detach()})
    made.stack_adapter(tmp_path / "adapter", layers=1)
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
