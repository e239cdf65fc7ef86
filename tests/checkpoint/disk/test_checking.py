"""`verify` detects a file that was changed after it was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint.disk import made
from oracles import dense_q, dense_weight, relative_error
from safetensors.torch import load_file, save_file

import hra_fx
from hra_fx.checkpoint.disk.arguments import read_request
from hra_fx.checkpoint.disk.plan import FilePlan, plan_fold
from hra_fx.checkpoint.disk.writing import check_copy, check_file
from hra_fx.errors import FoldError


def written(tmp_path: Path, *targets: str, gpt2: bool = False) -> tuple[FilePlan, Path]:
    """The plan of a fold, and the weights that it gave."""
    model = made.gpt2() if gpt2 else made.bert("BertForSequenceClassification")
    base = made.base_of(model, tmp_path / "base")
    saved = {} if gpt2 else {"modules_to_save": ["classifier"]}
    adapter = made.adapter_of(model, tmp_path / "adapter", *targets, **saved)
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    assert report.verified and "verified: row norms are preserved" in str(report)
    plan = plan_fold(read_request(base, adapter, tmp_path / "elsewhere"), None, inverse=False)
    planned = plan.files["model.safetensors"]
    assert isinstance(planned, FilePlan)
    return planned, tmp_path / "out" / "model.safetensors"


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
C_ATTN = "transformer.h.0.attn.c_attn.weight"
#: What was adapted, the changed value: tensor, place, by how much; and the message.
CHANGES: dict[str, tuple[str, str, tuple[int, ...], float, str]] = {
    "norm of a row": ("query", QUERY, (3, 2), 2.0, rf"row 3 of {QUERY} has norm .+ in the base, and a rotation pres"),
    "norm of a column": ("c_attn", C_ATTN, (3, 2), 2.0, rf"row 2 of {C_ATTN} has norm "),
    "NaN": ("query", QUERY, (5, 2), float("nan"), rf"row 5 of {QUERY} has norm nan"),
    "a copy": ("query", "bert.pooler.dense.bias", (0,), 1.0, r"bert.pooler.dense.bias differs from what was written\."),
    "a new value": ("query", "classifier.weight", (0, 0), 1.0, r"classifier.weight differs from what was written\."),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_value_is_found(tmp_path: Path, what: str) -> None:
    target, name, place, by, message = CHANGES[what]
    plan, file = written(tmp_path, target, gpt2=target == "c_attn")
    check_file(plan, file)
    state = load_file(file)
    state[name][place] += by
    save_file(state, file, {"format": "pt"})
    with pytest.raises(FoldError, match=rf"^{file}: {message}.*Check the disk"):
        check_file(plan, file)


def test_other_names_or_metadata(tmp_path: Path) -> None:
    plan, file = written(tmp_path, "query")
    state = load_file(file)
    for tensors, metadata in ((state, {"format": "np"}), (state | {"x": torch.ones(1)}, {"format": "pt"})):
        save_file(tensors, file, metadata)
        with pytest.raises(FoldError, match=r"the names or the metadata differ from what was written\. Check the disk"):
            check_file(plan, file)


def test_subnormal_and_zero_rows_pass(tmp_path: Path) -> None:
    """Subnormal numbers have a fixed step size."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        folder = tmp_path / str(dtype)
        (folder / "base").mkdir(parents=True)
        weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)) * torch.finfo(dtype).tiny
        weight[3] = 0
        save_file({"0.weight": weight.to(dtype)}, folder / "base" / "model.safetensors")
        adapter = made.stack_adapter(folder / "adapter", layers=1)
        hra_fx.fold_checkpoint(folder / "base", adapter, folder / "out", columns=[], verify=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
def test_reflections_that_nearly_cancel_each_other_pass(tmp_path: Path, dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "base").mkdir()
    weight = torch.randn(40, 64, dtype=torch.float64, generator=generator).to(dtype)
    save_file({"0.weight": weight}, tmp_path / "base" / "model.safetensors")
    adapter = made.stack_adapter(tmp_path / "adapter", layers=1, width=64, r=63)
    near = torch.randn(64, 1, dtype=torch.float64, generator=generator)
    near = near + spread * torch.randn(64, 63, dtype=torch.float64, generator=generator)
    save_file({"base_model.model.0.hra_u": near}, adapter / "adapter_model.safetensors", {"format": "pt"})
    report = hra_fx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out", columns=[], verify=True)
    assert 0 <= report.rounding < max(torch.finfo(dtype).eps / 2, 1e-15)
    folded = load_file(tmp_path / "out" / "model.safetensors")["0.weight"]
    assert relative_error(folded, dense_weight(weight, dense_q(near))) < max(torch.finfo(dtype).eps, 1e-12)


def test_a_file_that_was_copied_and_differs(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for file in (one, other):
        file.write_bytes(b"the same")
    check_copy(one, other)
    other.write_bytes(b"not same")
    with pytest.raises(FoldError, match=rf"^{other}: the copy differs from {one}\. Check the disk\.$"):
        check_copy(one, other)
