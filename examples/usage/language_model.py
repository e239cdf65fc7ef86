"""A language model: adapt, train for a few steps, generate, fold.

The weights are random; for a real model use `AutoModelForCausalLM.from_pretrained(...)`.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hra_fx


def main() -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip
    config = hra_fx.HRAConfig(r=8, target_modules="all-linear", modules_to_save=["lm_head"])
    model = hra_fx.get_peft_model(base, config)
    model.print_trainable_parameters()

    counting = torch.arange(48).remainder(16).repeat(4, 1) + 1  # 1 2 3 ... 16 1 2 3 ...
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(41):
        loss = model(input_ids=counting, labels=counting).loss
        if step % 20 == 0:
            print(f"step {step:2d}  loss {loss.item():.3f}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    prompt = torch.tensor([[1, 2, 3, 4]])
    model.eval()
    adapted = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
    )
    print("generated:", adapted[0].tolist())

    plain = model.merge_and_unload()  # the base model's class and keys
    folded = plain.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    print("the same when folded:", torch.equal(adapted, folded))


if __name__ == "__main__":
    main()
