"""QLoRA with reflections: a 4-bit base, PEFT's preparation, checkpointing and TRL.

PEFT's own HRA cannot compute over 4 bits, so it trains over the dequantized weights of the same model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from integrations.trl_use.runs import OURS, PEFT, TAKEN, logs, own_cache, redraw, trainer, vectors_of  # noqa: F401
from oracles import relative_error
from tiny import llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytestmark = pytest.mark.filterwarnings(
    # The names that transformers has had since 5.0; it means to rename them.
    "ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning",
)


def in_4_bits(folder: Path) -> Any:
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def sft(kind: str, base: Any, output: Path, *, use_reentrant: bool | None = None, **options: Any) -> Any:
    """TRL's trainer; with checkpointing, over a base that is prepared as the tutorials do it."""
    usual: dict[str, Any] = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2}
    if use_reentrant is not None:
        way = {"use_reentrant": use_reentrant}
        base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=way)
        usual |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": way}
    return trainer(kind, "SFT", output, base, "all-linear", **(usual | options))


def test_sft_of_trl_is_that_of_peft_over_the_dequantized_weights(tmp_path: Path) -> None:
    """A float32 base: over another, the backward of bitsandbytes rounds the weights and its forward does not."""
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    dequantized = in_4_bits(tmp_path / "base").dequantize().requires_grad_(requires_grad=False)
    theirs = sft(PEFT, dequantized, tmp_path)
    ours = sft(TAKEN, in_4_bits(tmp_path / "base"), tmp_path, use_reentrant=False)
    for made in (theirs, ours):
        for parameter in made.model.parameters():
            if parameter.requires_grad:  # as docs/large-models.md says it: TRL has made the vectors bfloat16
                assert parameter.dtype is torch.bfloat16
                parameter.data = parameter.data.float()
        redraw(made.model, seed=0)
        made.train()
    torch.testing.assert_close(*(torch.tensor(logs(made, "loss")) for made in (theirs, ours)), rtol=1e-4, atol=0)


def test_pairs_that_trl_leaves_in_bfloat16_train_and_a_run_is_resumed(tmp_path: Path) -> None:
    llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    whole, again = (
        sft(OURS, in_4_bits(tmp_path / "base"), tmp_path / "run", use_reentrant=True, bf16=True, save_steps=2)
        for _ in range(2)
    )
    before = {path: pairs.detach().clone() for path, pairs in vectors_of(whole.model).items()}
    assert {pairs.dtype for pairs in before.values()} == {torch.bfloat16}
    whole.train()
    trained = vectors_of(whole.model)
    assert min(relative_error(pairs, before[path]) for path, pairs in trained.items()) > 1e-3
    redraw(again.model)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(vectors_of(again.model), trained, rtol=0, atol=0)
