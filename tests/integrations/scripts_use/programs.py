"""Training as axolotl and LLaMA-Factory do it: their calls around PEFT, in their order, for a tiny Llama.

`peft.HRAConfig` stands where they make a configuration of LoRA. Nothing here knows of hra_fx.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from tiny_models import llama, samples
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

#: What the programs have in common: `(folder, dtype, use_reentrant, adapter)` -> a model that is ready to train. With
#: the folder of an adapter, it goes on from that one.
Loader = Callable[[Path, torch.dtype, bool, "Path | None"], Any]


def save_base(folder: Path, dtype: torch.dtype) -> None:
    llama().to(dtype).save_pretrained(folder / "base")


def with_adapter(model: Any, adapter: Path | None, **options: Any) -> Any:
    """A new adapter, or one from a folder that is trained further."""
    if adapter is not None:
        return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True, **options)
    torch.manual_seed(1)
    targets = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = peft.HRAConfig(task_type="CAUSAL_LM", r=4, target_modules=sorted(targets - {"lm_head"}))
    return peft.get_peft_model(model, config)


def axolotl(folder: Path, dtype: torch.dtype, use_reentrant: bool, adapter: Path | None = None) -> Any:
    """Norms and embeddings to float32 and back, checkpointing, inputs that require gradients, then the adapter."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    model.config.use_cache = False
    model.tie_weights()
    _cast(model, torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    _cast(model, dtype)
    model.enable_input_require_grads()
    model = with_adapter(model, adapter)
    model.print_trainable_parameters()
    return model


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for name, module in model.named_modules():
        if any(part in name for part in ("norm", "embed_tokens", "lm_head")):
            module.to(dtype)


def llama_factory(folder: Path, dtype: torch.dtype, use_reentrant: bool, adapter: Path | None = None) -> Any:
    """Norms to float32, its own checkpointing, float32 logits, the adapter, and what is trained to float32."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" in name:
            parameter.data = parameter.data.to(torch.float32)
    through = partial(_checkpoint, partial(checkpoint, use_reentrant=use_reentrant))
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=through)
    model.config.use_cache = False
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: output.float())
    places = {"subfolder": "", "offload_folder": "offload", "revision": "main"}
    model = with_adapter(model, adapter, **(places if adapter else {}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return model.train()


def _checkpoint(through: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Checkpoint a layer, and make its hidden states require gradients, in place of `enable_input_require_grads`."""
    next(arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()).requires_grad_(True)
    return through(function, *args, **kwargs)


LOADERS: dict[str, Loader] = {"axolotl": axolotl, "LLaMA-Factory": llama_factory}


def trainer(program: str, model: Any, folder: Path, *, callbacks: Any = None, **options: Any) -> Trainer:
    """Four steps of AdamW, with a checkpoint after the second."""
    ours = program == "LLaMA-Factory"
    make: Any = Seq2SeqTrainer if ours else Trainer
    arguments: Any = Seq2SeqTrainingArguments if ours else TrainingArguments
    args = arguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    made: Trainer = make(model=model, args=args, train_dataset=samples("llama", 32), callbacks=callbacks)
    return made


def losses(one: Trainer) -> list[float]:
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


def merged(folder: Path, dtype: torch.dtype, adapter: Path) -> Any:
    """The model that both programs export."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    model = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(progressbar=False)
    model.requires_grad_(False)
    model.eval().to(dtype).save_pretrained(folder / "merged", max_shard_size="5GB")
    return AutoModelForCausalLM.from_pretrained(folder / "merged")
