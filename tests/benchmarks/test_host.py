"""How many functions of hra_fx a training step passes; the times themselves are in no test."""

from __future__ import annotations

import host
import transformers

import hra_fx


def test_an_adapted_linear_and_the_batch_pass_few_functions() -> None:
    inside, outside = host.frames(host.adapted_model().train())
    assert inside < 6.1, "in each layer; the first ones ask which side is cheaper"
    assert outside < 3, "in the batch, for each layer"


def test_so_do_linears_with_transposed_weights() -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)
    model = hra_fx.transform(transformers.GPT2LMHeadModel(config), hra_fx.HRAConfig(r=2, target_modules=["c_attn"]))
    assert host.frames(model.train())[0] < 7.1
