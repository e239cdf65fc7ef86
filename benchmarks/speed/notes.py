"""What the page says about its numbers."""

from __future__ import annotations

SUMMARY = """\
hra_fx, and its time or memory divided by that of PEFT LoRA, PEFT HRA and the frozen base model in the same run: below 1
hra_fx is better. Llama, d=768, 3 layers, adapters of rank 8 on q, k, v, gate and up, float32, on a CPU, unless the row
says otherwise. See [how it was measured](#how-it-was-measured).
"""

TABLES = """\
In each row of the tables below, the first method has a time and the others their time divided by it; in tables of
memory and setup all have units. "hra_fx, GS" applies Gram-Schmidt, and "folded" is hra_fx merged into the weights.
The last column divides the times of the same rounds, so it can differ from the quotient of two columns.
"""

METHOD = """\
Ratios are medians over rounds in one process. In each round every method takes one step, in random order, each after
a warm-up step of the same model (unless a step takes two seconds or more). A ratio compares two methods in the same
round. Its interval is the 95% interval of the median, or the range of all pairs if there are fewer than six. Methods
that are many times slower than the others take part in only some of the rounds.

Training is `zero_grad`, forward, backward and AdamW. The frozen base model trains nothing: it runs the forward, and
the backward down to the output of its embeddings (or of its first convolution), so its backward is longer than with
adapters. The single Linear represents a layer inside a model: its input requires a gradient, for the base model too.
Adapted layers: q, k, v, gate and up of the Llama; query, key, value and dense of BERT; all Linear layers of ViT; the
3x3 convolutions of ResNet-50; to_q, to_k, to_v and to_out of the UNet. PEFT's methods have their default settings:
LoRA with `lora_alpha=r` and without dropout, OFT with blocks of 32 (for every r), HRA with the same r. Weights are
random. All methods share the weights of the base model, except "folded" and a copy of the base model, which have their
own. How far the copy is from 1 is the noise.

Compiled means `torch.compile(dynamic=False)`, measured after compilation. Peak memory is measured in a separate
process per method: the growth of the resident memory over two steps, after the model, the inputs and the optimizer
were created. `generate` makes 8 tokens after a prompt of 16, with a KV cache.
"""

TARGETS = """\
The project's own limits, which `make bench-quick` measures alone: each is a ratio of two methods in the same rounds,
for the Llama of width 768 in float32 with r=8 unless the row says otherwise. A result is unsure if the interval
contains the limit. The limits of the folded model are 1, and the noise between two copies of the base model.
`set_adapter` has a benchmark of its own, benchmarks/switching.py.
"""
