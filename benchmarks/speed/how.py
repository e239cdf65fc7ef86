"""How it was measured, in words, for the pages."""

from __future__ import annotations

ON_CPU = """\
Ratios are medians over rounds of one process. A round takes one step of every method, in an order drawn anew, each
after an uncounted step of the same model (one of two seconds or more has none). A ratio is that of two methods in the
same round; its interval is that of 95% for the median, or all pairs where there are fewer than six. A method many times
slower than the others takes part in some of the rounds only. Columns without a unit are times the first method.

Training is `zero_grad`, forward, backward and AdamW. The frozen base trains nothing: it runs forward, and backward down
to the output of its embeddings (of its first convolution), beyond the first adapters, where that of the others ends.
One Linear alone stands for one in the middle of a model: its input needs a gradient, with the base as with adapters.
Adapters sit on q, k, v, gate and up of the Llama, on query, key, value and dense of BERT, on all Linear layers of ViT,
on the 3x3 convolutions of ResNet-50, and on to_q, to_k, to_v and to_out of the UNet. PEFT's are as they come: LoRA with
`lora_alpha=r` and no dropout, OFT in blocks of 32 (whatever r), HRA of the same r. Weights are random. All methods
share the base's weights, but "base again" and "folded", which have copies of their own: how far base again is from 1 is
the noise.

Compiled means `torch.compile(dynamic=False)`, counted when warm. Peak memory is that of a process of its own for each
method: how far its resident memory grew over two steps beyond what it was when model, inputs and optimizer were ready.
`generate` makes 8 tokens after a prompt of 16, with the cache of keys and values.
"""

ON_GPU = """\
Ratios are medians over rounds of one process, as in [benchmarks.md](benchmarks.md). Memory is
`torch.cuda.max_memory_allocated` over two steps, beyond what was allocated before. Kernels are calls of
`cudaLaunchKernel` and its like, counted by `torch.profiler`.
"""
