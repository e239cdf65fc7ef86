"""QLoRA with reflections: a 4-bit base, PEFT's preparation, checkpointing and TRL.

PEFT's own HRA cannot compute over 4 bits, so it trains over the dequantized weights of the same model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapting import vectors_of
from integrations.trl_use.runs import OURS, PEFT, TAKEN, logs, own_cache, redraw, trainer  # noqa: F401
from oracles import relative_error
from tiny import llama
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

pytestmark = pytest.mark.filterwarnings(
    # The names that transformers has had since 5.0; it means to rename them.
    "ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning",
)

FIELDS: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def checkpointing(*, use_reentrant: bool) -> dict[str, Any]:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}


def in_4_bits(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def prepared(folder: Path, *, use_reentrant: bool) -> Any:
    """The base model, as the tutorials prepare it."""
    options = {"use_reentrant": use_reentrant}
    return peft.prepare_model_for_kbit_training(in_4_bits(folder), gradient_checkpointing_kwargs=options)


def losses(trainer: Trainer) -> Tensor:
    return torch.tensor(logs(trainer, "loss")).flatten()


def sft(kind: str, base: Any, output: Path, **options: Any) -> Any:
    """TRL's trainer."""
    usual = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2}
    return trainer(kind, "SFT", output, base, FIELDS["target_modules"], **(usual | options))


def test_sft_of_trl_is_that_of_peft_over_the_dequantized_weights(tmp_path: Path) -> None:
    """A float32 base: over another, the backward of bitsandbytes rounds the weights and its forward does not."""
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    dequantized = in_4_bits(tmp_path / "base").dequantize().requires_grad_(requires_grad=False)
    found = []
    for kind, base in ((PEFT, dequantized), (TAKEN, prepared(tmp_path / "base", use_reentrant=False))):
        made = sft(kind, base, tmp_path, **(checkpointing(use_reentrant=False) if kind == TAKEN else {}))
        for parameter in made.model.parameters():
            if parameter.requires_grad:  # as docs/large-models.md says it: TRL has made the vectors bfloat16
                assert parameter.dtype is torch.bfloat16
                parameter.data = parameter.data.float()
        redraw(made.model, seed=0)
        made.train()
        found.append(losses(made))
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


def test_pairs_that_trl_leaves_in_bfloat16_train(tmp_path: Path) -> None:
    llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = prepared(tmp_path / "base", use_reentrant=True)
    made = sft(OURS, base, tmp_path, bf16=True, **checkpointing(use_reentrant=True))
    before = {path: pairs.detach().clone() for path, pairs in vectors_of(made.model).items()}
    assert {pairs.dtype for pairs in before.values()} == {torch.bfloat16}
    made.train()
    changed = [relative_error(pairs, before[path]) for path, pairs in vectors_of(made.model).items()]
    assert min(changed) > 1e-3
