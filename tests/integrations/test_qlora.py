"""QLoRA with reflections: a 4-bit base, PEFT's preparation, checkpointing, Trainer and TRL, and files.

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
from tiny_models import tokens_of, trainer_of
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

import hra_fx

pytestmark = pytest.mark.filterwarnings(
    # The names that transformers has had since 5.0; it means to rename them.
    "ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning",
)

FIELDS: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "plain": {"gradient_checkpointing": False},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def in_4_bits(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def prepared(folder: Path, mode: str = "plain") -> Any:
    """The base model, as the tutorials prepare it."""
    options = CHECKPOINTING[mode]
    return peft.prepare_model_for_kbit_training(
        in_4_bits(folder),
        use_gradient_checkpointing=options["gradient_checkpointing"],
        gradient_checkpointing_kwargs=options.get("gradient_checkpointing_kwargs"),
    )


def adapted(base: Any, seed: int = 0) -> Any:
    """With pairs of vectors that cancel, so that the model is the base model."""
    model = hra_fx.transform(base, hra_fx.HRAConfig(**FIELDS))
    redraw(model, seed)
    return model


def logits(model: Any) -> Tensor:
    """Without dropout, in train mode: in eval mode, bitsandbytes computes unadapted layers in bfloat16 on some CPUs."""
    with torch.no_grad():
        return model.train()(input_ids=tokens_of(2, 8)).logits.float()


def losses(trainer: Trainer) -> Tensor:
    return torch.tensor(logs(trainer, "loss")).flatten()


def test_a_run_is_saved_opened_over_4_bits_and_goes_on(folder: Path, tmp_path: Path) -> None:
    mode = "not reentrant"
    options = {**CHECKPOINTING[mode], "save_strategy": "steps", "save_steps": 3, "seed": 0, "learning_rate": 5e-2}
    whole = trainer_of(Trainer, "llama", adapted(prepared(folder, mode)), tmp_path / "run", **options)
    whole.train()
    again = trainer_of(Trainer, "llama", adapted(prepared(folder, mode), seed=100), tmp_path / "run", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert torch.equal(logits(again.model), logits(whole.model))

    whole.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 40_000
    by_peft = peft.PeftModel.from_pretrained(prepared(folder), tmp_path / "adapter", is_trainable=True)
    ours = hra_fx.load_adapter(prepared(folder, mode), tmp_path / "adapter", is_trainable=True)
    for model in (hra_fx.from_peft(by_peft), ours):
        torch.testing.assert_close(logits(model), logits(whole.model), rtol=0, atol=1e-5)
        assert len(vectors_of(model)) == 14
        assert all(vectors.requires_grad for vectors in vectors_of(model).values())
    further = trainer_of(Trainer, "llama", ours, tmp_path, learning_rate=5e-2, seed=0)
    further.train()
    assert losses(further).mean() < losses(whole).mean() - 0.2


def sft(kind: str, base: Any, output: Path, **options: Any) -> Any:
    """TRL's trainer."""
    usual = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2}
    return trainer(kind, "SFT", output, base, FIELDS["target_modules"], **(usual | options))


def test_sft_of_trl_is_that_of_peft_over_the_dequantized_weights(tmp_path: Path) -> None:
    """A float32 base: over another, the backward of bitsandbytes rounds the weights and its forward does not."""
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    dequantized = in_4_bits(tmp_path / "base").dequantize().requires_grad_(requires_grad=False)
    mode, found = "not reentrant", []
    for kind, base in ((PEFT, dequantized), (TAKEN, prepared(tmp_path / "base", mode))):
        made = sft(kind, base, tmp_path, **(CHECKPOINTING[mode] if kind == TAKEN else {}))
        for parameter in made.model.parameters():
            if parameter.requires_grad:  # as docs/large-models.md says it: TRL has made the vectors bfloat16
                assert parameter.dtype is torch.bfloat16
                parameter.data = parameter.data.float()
        redraw(made.model, seed=0)
        made.train()
        found.append(losses(made))
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


def test_pairs_that_trl_leaves_in_bfloat16_train(folder: Path, tmp_path: Path) -> None:
    made = sft(OURS, prepared(folder, "reentrant"), tmp_path, bf16=True, **CHECKPOINTING["reentrant"])
    before = {path: pairs.detach().clone() for path, pairs in vectors_of(made.model).items()}
    assert {pairs.dtype for pairs in before.values()} == {torch.bfloat16}
    made.train()
    changed = [relative_error(pairs, before[path]) for path, pairs in vectors_of(made.model).items()]
    assert min(changed) > 1e-3
