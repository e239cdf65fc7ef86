"""Keep what a model computes for some texts, whatever else it learns.

The texts are short, so their inputs of each layer span few directions, and all of them are protected. With long texts,
the directions that contain most of the inputs are.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hra_fx


def logits(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=48, use_cache=False, **sizes)).eval()
    kept, learned = torch.randint(48, (2, 5)), torch.randint(48, (4, 12))

    for protected in (False, True):
        model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=8, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if protected:
            print(hra_fx.protect(model, [{"input_ids": kept}]))
        losses = []
        for _ in range(60):
            loss = model(input_ids=learned, labels=learned).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        change = float((logits(model, kept) - logits(base, kept)).norm() / logits(base, kept).norm())
        print(f"{'with' if protected else 'without'} protect: loss {losses[0]:.2f} -> {losses[-1]:.2f}, "
              f"change of the logits for the kept texts: {change:.1e}")  # fmt: skip

    print(f"the adapters move what is protected by {max(row.moved or 0 for row in hra_fx.report(model)):.2%}")
    change = float((logits(hra_fx.fold(model), kept) - logits(base, kept)).norm() / logits(base, kept).norm())
    print(f"folded: {change:.1e}")


if __name__ == "__main__":
    main()
