"""The programs train the same adapter with PEFT's HRA and with that accelerated, which one line switches on."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from integrations.scripts_use.programs import LOADERS, losses, merged, save_base, trainer
from oracles import relative_error
from peft.tuners.hra.layer import HRALinear
from safetensors.torch import load_file
from tiny_models import batch, vectors_of
from torch import Tensor
from transformers import LlamaForCausalLM

import hra_fx

# Names that transformers has had since 5.0, and means to rename; PEFT uses them.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")

#: Base models in bfloat16 are trained under autocast, where PEFT computes Q in bfloat16 and hra_fx in float32.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
LAYERS = 14


@dataclass
class Run:
    """What a program leaves behind: losses of three trainings, and the files."""

    whole: list[float]
    resumed: list[float]
    continued: list[float]
    files: dict[str, Tensor]
    config: dict[str, Any]
    start: dict[str, Tensor]
    logits: Tensor


def run(program: str, folder: Path, dtype: torch.dtype, use_reentrant: bool, way: AbstractContextManager[Any]) -> Run:
    """Train with checkpoints, resume from one, go on from the saved adapter, and export the merged model."""
    save_base(folder, dtype)
    options = {"bf16": dtype is torch.bfloat16}
    with way as handle:
        model = LOADERS[program](folder, dtype, use_reentrant, None)
        assert handle is None or len(handle.layers) == LAYERS
        assert all((type(m) is HRALinear) == (handle is None) for m in model.modules() if isinstance(m, HRALinear))
        start = {name: vectors.detach().clone() for name, vectors in vectors_of(model).items()}
        assert {vectors.dtype for vectors in start.values()} == {torch.float32}
        whole = trainer(program, model, folder / "out", **options)
        whole.train()
        whole.save_model()
        again = trainer(program, LOADERS[program](folder, dtype, use_reentrant, None), folder / "out", **options)
        again.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
        loaded = LOADERS[program](folder, dtype, use_reentrant, folder / "out")
        continued = trainer(program, loaded, folder / "continued", **options)
        continued.train()
        exported = merged(folder, dtype, folder / "out")
    assert type(exported) is LlamaForCausalLM
    with torch.no_grad():
        logits = exported.eval()(batch("llama")["input_ids"]).logits
    return Run(
        losses(whole),
        losses(again),
        losses(continued),
        load_file(folder / "out" / "adapter_model.safetensors"),
        json.loads((folder / "out" / "adapter_config.json").read_text()),
        start,
        logits,
    )


@pytest.mark.parametrize(
    ("program", "dtype", "use_reentrant"),
    [
        ("LLaMA-Factory", torch.float32, True),
        pytest.param("axolotl", torch.bfloat16, False, marks=pytest.mark.slow),
    ],
    ids=["LLaMA-Factory, float32, reentrant", "axolotl, bfloat16"],
)
def test_accelerated_it_trains_as_with_peft(
    program: str, dtype: torch.dtype, use_reentrant: bool, tmp_path: Path
) -> None:
    theirs = run(program, tmp_path / "theirs", dtype, use_reentrant, nullcontext())
    fast = run(program, tmp_path / "fast", dtype, use_reentrant, hra_fx.accelerate_peft())
    bound = BOUNDS[dtype]
    for name in ("whole", "resumed", "continued"):
        assert getattr(fast, name) == pytest.approx(getattr(theirs, name), rel=bound), name
    assert len(fast.whole) == 4
    # What was trained is what is resumed and continued.
    assert fast.resumed == pytest.approx(fast.whole, rel=bound)
    assert abs(fast.continued[0] - fast.whole[0]) > 1e-2
    assert entries(fast.files) == entries(theirs.files)
    assert len(fast.files) == LAYERS and all(key.endswith(".hra_u") for key in fast.files)
    assert_same_config(fast.config, theirs.config)
    if dtype is torch.float32:
        for name, before in fast.start.items():
            key = name.removesuffix(".default")
            assert relative_error(fast.files[key] - before, theirs.files[key] - before) < 1e-2, key
    assert relative_error(fast.logits, theirs.logits) < 3 * bound


def entries(files: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in files.items()}


def assert_same_config(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Apart from the folder of the base model, and the order of sets."""
    for config in (got, wanted):
        config["target_modules"] = sorted(config["target_modules"])
        assert Path(config.pop("base_model_name_or_path")).name == "base"
    assert got == wanted
    assert peft.HRAConfig.from_peft_type(**got).r == 4
