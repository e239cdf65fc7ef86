"""What the page says about its numbers."""

from __future__ import annotations

SUMMARY = """\
Time or memory of hra_fx, and its ratio to PEFT LoRA, PEFT HRA and the frozen base model in the same run. Below 1,
hra_fx is better. Unless the row says otherwise, the model is a Llama, d=768, 3 layers, with adapters of rank 8 on q,
k, v, gate and up, in float32 on a CPU. See [how it was measured](#how-it-was-measured).
"""

TABLES = """\
In each row of the tables below, the value of the first method is a time. The values of the others are their times
divided by it. In tables of memory and setup, all values have units. "hra_fx, GS" applies Gram-Schmidt, and "folded"
is hra_fx merged into the weights. The last column divides times from the same rounds, so it can differ from the
quotient of two columns.
"""

METHOD = """\
Ratios are medians over rounds in one process. In each round every method takes one step, in random order, each after
a warm-up step of the same model (unless a step takes two seconds or more). A ratio compares two methods in the same
round. Its interval is the 95% interval of the median, or the range of all pairs if there are fewer than six. Methods
that are many times slower than the others run in only some of the rounds.

A training step is `zero_grad`, forward, backward and AdamW. The frozen base model trains nothing. It runs the forward
and the backward down to the output of its embeddings (or of its first convolution), so its backward is longer than
with adapters. The single Linear represents a layer inside a model: its input requires a gradient, also for the base
model. Adapted layers: q, k, v, gate and up of the Llama; query, key, value and dense of BERT; all Linear layers of
ViT; the 3x3 convolutions of ResNet-50; to_q, to_k, to_v and to_out of the UNet. PEFT's methods have their default
settings: LoRA with `lora_alpha=r` and without dropout, OFT with blocks of 32 (for every r), HRA with the same r.
Weights are random. All methods share the weights of the base model, except "folded" and a copy of the base model,
which have their own. The ratio of the copy to the base model shows the noise.

Compiled means `torch.compile(dynamic=False)`, measured after compilation. Peak memory is measured in a separate
process per method: the growth of the resident memory over two steps, after the model, the inputs and the optimizer
were created. `generate` creates 8 tokens after a prompt of 16, with a KV cache.
"""

TARGETS = """\
The project's own limits. `make bench-quick` measures only these. Each is a ratio of two methods in the same rounds,
for the Llama of width 768 in float32 with r=8, unless the row says otherwise. A result is unsure if the interval
contains the limit. The limits of the folded model are 1 plus the noise between two copies of the base model.
`set_adapter` has a separate benchmark, benchmarks/switching.py.
"""
