"""QLoRA with reflections and TRL: train over a 4-bit base, export as LoRA, and fold into the 16-bit base.

    python examples/usage/qlora.py meta-llama/Llama-3.1-8B --output qlora    # on a GPU
    python examples/usage/qlora.py --tiny                                    # a random Llama, on a CPU

It needs bitsandbytes, PEFT and TRL. The base is a name on the Hub or a folder.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import peft
import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import SFTConfig, SFTTrainer

import hra_fx

TEXT = "A reflection keeps the length of every vector. An even number of them in a row is a rotation of the weights. "


def in_4_bits(base: Path) -> PreTrainedModel:
    """The base model in 4 bits, prepared as in PEFT's documentation."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = {"": 0} if torch.cuda.is_available() else None
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map=device)
    return peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[float]:
    """Train; return the losses."""
    on_gpu = torch.cuda.is_available()
    arguments = SFTConfig(
        str(folder), max_steps=20, per_device_train_batch_size=4, learning_rate=3e-3, logging_steps=1, max_length=128,
        bf16=on_gpu, use_cpu=not on_gpu, save_strategy="no", report_to=[], disable_tqdm=True, seed=0,
        dataloader_pin_memory=on_gpu,
    )  # fmt: skip
    texts = Dataset.from_list([{"text": TEXT}] * 80)
    trainer = SFTTrainer(model, arguments, train_dataset=texts, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def loss_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    batch = tokenizer(TEXT, return_tensors="pt").input_ids.to(model.device)
    return model(input_ids=batch, labels=batch).loss.item()


def run(base: Path, output: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    # Every Linear: bitsandbytes passes no gradient through others that a CPU with AVX512-BF16 has evaluated.
    config = hra_fx.HRAConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = hra_fx.transform(in_4_bits(base), config)
    losses = train(model, tokenizer, output / "run")
    print(f"trained over 4 bits, loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    trained = loss_of(model, tokenizer)
    hra_fx.save_adapter(model, output / "adapter")
    hra_fx.save_as_lora(model, output / "lora")  # of the 4-bit weights, to be served over them
    del model

    model = hra_fx.load_adapter(in_4_bits(base), output / "adapter")
    print(f"opened over 4 bits, difference of the loss: {abs(loss_of(model, tokenizer) - trained):.1e}")
    model = peft.PeftModel.from_pretrained(in_4_bits(base), output / "lora")
    print(f"as LoRA over 4 bits, difference of the loss: {abs(loss_of(model, tokenizer) - trained):.1e}")
    del model

    hra_fx.fold_checkpoint(base, output / "adapter", output / "folded")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, after = (
        loss_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device), tokenizer)
        for folder in (base, output / "folded")
    )
    print(f"folded into the 16-bit base, loss {before:.2f} -> {after:.2f}")


def tiny(folder: Path) -> Path:
    """A random Llama in bfloat16 on disk; its vocabulary has the words of the text."""
    torch.manual_seed(0)
    words = dict.fromkeys(["<pad>", "<eos>", *TEXT.replace(".", " .").split()])
    rules = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", eos_token="<eos>")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(initializer_range=0.2, **tokens, **sizes)).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="Qwen/Qwen3-8B", help="a name on the Hub or a folder")
    parser.add_argument("--output", type=Path, default=Path("qlora"))
    parser.add_argument("--tiny", action="store_true", help="a random Llama, in a temporary folder")
    given = parser.parse_args()
    if given.tiny:
        with tempfile.TemporaryDirectory() as folder:
            run(tiny(Path(folder, "base")), Path(folder))
        return
    base = Path(given.model)
    if not base.is_dir():
        base = Path(snapshot_download(given.model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    run(base, given.output)


if __name__ == "__main__":
    main()
