"""Keep a language model near its base while it learns: no data is needed, because it writes the samples itself."""

from __future__ import annotations

import copy
from itertools import cycle

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hra_fx


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=48, initializer_range=0.1, **sizes))
    learned = torch.randint(48, (4, 12))

    for weight in (0.0, 1.0):
        model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=8, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        samples = cycle(hra_fx.own_texts(model, count=64, length=12, batch_size=4))
        losses = []
        for _ in range(100):
            task = model(input_ids=learned, labels=learned).loss
            loss = task + weight * hra_fx.distance_to_base(model, next(samples))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(task.item())
        (others,) = hra_fx.own_texts(model, count=64, length=12, batch_size=64, seed=1)
        distance = hra_fx.distance_to_base(model, others).item()
        print(f"weight {weight}: loss {losses[0]:.2f} -> {losses[-1]:.2f}, distance for other texts {distance:.3f}")


if __name__ == "__main__":
    main()
