"""The rows for PEFT's benchmark: their configurations load, and the benchmark can use the model of their script."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from shutil import copy
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from documents import DOCS
from tiny import llama

import hra_fx

FOLDER = DOCS / "upstream" / "metamathqa"
EXPERIMENTS = sorted((FOLDER / "experiments" / "hra").iterdir())


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_peft_and_hra_fx_read_the_same_configuration(folder: Path) -> None:
    theirs, ours = peft.PeftConfig.from_pretrained(folder), hra_fx.HRAConfig.from_pretrained(folder)
    assert type(theirs) is peft.HRAConfig
    assert (theirs.r, theirs.target_modules) == (ours.r, ours.target_modules) == (32, {"q_proj", "v_proj"})


def test_the_benchmark_can_use_a_protected_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, fresh = (llama(hidden_size=128, intermediate_size=128).to(torch.bfloat16) for _ in range(2))
    ids = torch.randint(5, 60, (2, 9))
    before = base(ids).logits
    config = peft.PeftConfig.from_pretrained(EXPERIMENTS[1])
    benchmark: Any = ModuleType("utils")
    benchmark.get_model = lambda **options: peft.get_peft_model(base, config, **options)
    (tmp_path / "run.py").write_text(
        "import sys, utils\nutils.given, utils.model = sys.argv[1:], utils.get_model(autocast_adapter_dtype=True)\n"
    )
    monkeypatch.setitem(sys.modules, "utils", benchmark)
    monkeypatch.setattr(sys, "argv", ["run_hra_fx.py", "--protect", "-v", "experiment"])
    runpy.run_path(str(copy(FOLDER / "run_hra_fx.py", tmp_path)), run_name="__main__")
    model = benchmark.model
    assert benchmark.given == ["-v", "experiment"]
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert model.get_nb_trainable_parameters()[0] == 4 * 128 * 32 == sum(one.numel() for one in vectors)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, num_items_in_batch=ids.numel()).loss.backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        after = model(input_ids=ids).logits
        assert model.generate(input_ids=ids, max_length=14, min_length=14).shape == (2, 14)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.allclose(after, before, atol=0.1)
    moved = [row.moved for row in hra_fx.report(model).rows]
    assert len(moved) == 4
    assert all(share is not None and share < 1e-5 for share in moved)

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        found, wanted = (one.float()(input_ids=ids).logits for one in (again, model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
