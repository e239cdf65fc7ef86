"""How the benchmarks are measured, as text for the pages."""

from __future__ import annotations

ON_CPU = """\
Ratios are medians over rounds in one process. In each round every method takes one step, in random order, each after
a warm-up step of the same model (unless a step takes two seconds or more). A ratio compares two methods in the same
round. Its interval is the 95% interval of the median, or the range of all pairs if there are fewer than six. Methods
that are many times slower than the others take part in only some of the rounds. Columns without a unit are relative
to the first method.

Training is `zero_grad`, forward, backward and AdamW. The frozen base model trains nothing: it runs the forward, and
the backward down to the output of its embeddings (or of its first convolution), so its backward is longer than with
adapters. The single Linear represents a layer inside a model: its input requires a gradient, for the base model too.
Adapted layers: q, k, v, gate and up of the Llama; query, key, value and dense of BERT; all Linear layers of ViT; the
3x3 convolutions of ResNet-50; to_q, to_k, to_v and to_out of the UNet. PEFT's methods have their default settings:
LoRA with `lora_alpha=r` and without dropout, OFT with blocks of 32 (for every r), HRA with the same r. Weights are
random. All methods share the weights of the base model, except "base again" and "folded", which have copies. The
difference of "base again" from 1 is the noise.

Compiled means `torch.compile(dynamic=False)`, measured after compilation. Peak memory is measured in a separate
process per method: the growth of the resident memory over two steps, after the model, the inputs and the optimizer
were created. `generate` makes 8 tokens after a prompt of 16, with a KV cache.
"""

ON_GPU = """\
Ratios are medians over rounds in one process, as in [benchmarks.md](benchmarks.md). Memory is
`torch.cuda.max_memory_allocated` over two steps, without the memory that was allocated before. Kernels are launches
(`cudaLaunchKernel` and similar) counted by `torch.profiler`.
"""
