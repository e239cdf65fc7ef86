"""Train a small Llama with transformers' Trainer under DeepSpeed, as one of several processes.

    deepspeed_training.py MODEL STAGE STEPS OUTPUT [--protect] [--resume]

The model is loaded after the arguments of the Trainer were made, so under ZeRO-3 its weights are partitioned from the
start, and it cannot be protected. With `--protect`, it is loaded and protected before; a run that is resumed gets the
directions from the checkpoint. Prints the losses.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import hra_fx
from hra_fx.errors import AdapterError

#: Also every small parameter is partitioned; by default DeepSpeed leaves those below 100,000 numbers whole.
ZERO = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
BATCH = 4


def texts() -> list[dict[str, torch.Tensor]]:
    """The training data, the same in every process."""
    tokens = torch.randint(0, 64, (32, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def adapted(model_path: str) -> Any:
    """A model with an adapter."""
    model = LlamaForCausalLM.from_pretrained(model_path)
    torch.manual_seed(0)
    return hra_fx.get_peft_model(model, hra_fx.HRAConfig(r=4, target_modules="all-linear"))


def main(model_path: str, stage: str, steps: str, output: str, protect: bool, resume: bool) -> None:
    """Train, save, and print the losses."""
    samples = [{"input_ids": torch.arange(16).view(2, 8)}]
    if protect:
        model = adapted(model_path)
        if not resume:
            hra_fx.protect(model, samples, 4)
    zero = {"stage": int(stage), **(ZERO if stage == "3" else {})}
    deepspeed = {} if stage == "0" else {"deepspeed": {**DEEPSPEED, "zero_optimization": zero}}
    args = TrainingArguments(
        output,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=int(steps),
        learning_rate=1e-2,
        adam_epsilon=1e-4,  # the first gradient of sums is zero, and AdamW would enlarge its rounding error
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        **deepspeed,
    )
    if not protect:
        model = adapted(model_path)
    if stage == "3" and not protect:
        try:
            hra_fx.protect(model, samples, 4)
        except AdapterError as error:
            assert "(ZeRO-3), so hra_fx cannot protect it." in str(error)
        else:
            raise AssertionError("it cannot be protected")
    trainer = Trainer(model=model, args=args, train_dataset=texts())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(Path(output, "final")))
    if args.process_index == 0:
        print("losses:", json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # DeepSpeed's own
    main(*sys.argv[1:5], protect="--protect" in sys.argv, resume="--resume" in sys.argv)
