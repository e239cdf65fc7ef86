"""Select blocks by their index in a module list."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

import hra_fx


def main() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2)
    )
    config = hra_fx.HRAConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[4, 5],  # the last two blocks ...
        layers_pattern="layers",  # ... of `model.layers`
    )
    for row in hra_fx.report(hra_fx.transform(model, config)):
        print(f"{row.path}: {row.layer_type}, r={row.r}, {row.parameters} parameters")


if __name__ == "__main__":
    main()
