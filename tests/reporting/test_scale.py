"""Costs on paper: against PEFT's parameters, the factors of a layer, and formulas worked out by hand.

Two processes check memory and communication (`integrations/distributed/scale_checks.py`).
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from integrations.distributed.trained import CASES
from moe_models import built
from named_models import tiny_llama
from torch import nn

import hra_fx
from hra_fx.errors import AdapterError
from hra_fx.layers.batching import factors_of
from hra_fx.reporting.scale import costs

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def wide(*widths: int) -> Any:
    with torch.device("meta"):
        layers = [nn.Linear(d, out, bias=False) for d, out in zip(widths[::2], widths[1::2], strict=True)]
    return nn.Sequential(*layers)


def adapted(model: Any, **fields: Any) -> Any:
    return hra_fx.transform(model, hra_fx.HRAConfig(**{"target_modules": "all-linear", **fields}))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which PEFT reads
@pytest.mark.parametrize("r", [2, 4, 8])
def test_lora_has_the_parameters_of_peft(r: int) -> None:
    _, lora, equal = costs(adapted(tiny_llama(), r=r, target_modules=TARGETS), 2, "ddp")
    for cost in (lora, equal):
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=cost.rank, target_modules=TARGETS))
        assert cost.parameters == theirs.get_nb_trainable_parameters()[0]
    assert lora.rank == r


def test_lora_of_a_convolution_has_the_parameters_of_peft() -> None:
    case = CASES["convolutions"]
    targets = {"target_modules": ["0", "5"]}  # PEFT's rank must divide by the groups of the other one
    theirs = peft.get_peft_model(case.make(), peft.LoraConfig(r=4, **targets))
    assert (
        costs(adapted(case.make(), r=4, **targets), 2, "ddp")[1].parameters == theirs.get_nb_trainable_parameters()[0]
    )


def test_lora_with_equal_parameters() -> None:
    hra, _, equal = costs(adapted(wide(64, 64, 64, 192), r=16), 2, "ddp")
    assert (hra.parameters, equal.rank, equal.parameters) == (2 * 64 * 16, 5, 5 * (64 + 64 + 64 + 192))


@pytest.mark.parametrize("fields", [{"r": 4}, {"r": 3}, {"r": 4, "apply_GS": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_have_the_size_of_those_of_a_forward(fields: dict[str, Any], dtype: torch.dtype) -> None:
    model = adapted(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).to(dtype), **fields)
    made = [factors_of(layer.hra_u, dtype) for layer in model]
    assert costs(model, 2, "fsdp2")[0].factors == sum(t.nbytes for pair in made if pair for t in pair)


def test_experts_count_each() -> None:
    model = built("qwen3_moe")
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_parameters=["experts.down_proj"]))
    hra, lora, _ = costs(model, 2, "ddp")
    layers = [module for name, module in model.named_modules() if name.endswith("hra_down_proj")]
    experts, out, d = layers[0].hra_base.shape
    assert hra.parameters == len(layers) * experts * d * 2
    assert lora.parameters == len(layers) * experts * 2 * (d + out)


def test_ddp_reduces_in_buckets_the_first_of_which_is_small() -> None:
    """32 KiB, 1 MiB and 25 MiB of gradients, the last layer first: it alone fills the first bucket."""
    d, r = 1024, 8
    assert costs(adapted(wide(d, 8), r=r), 4, "ddp")[0].collectives == 1
    hra = costs(adapted(wide(d, 8, 32 * d, 8, d, 8, 800 * d, 8, 32 * d, 8), r=r), 4, "ddp")[0]
    assert hra.collectives == 3
    assert hra.sent == 2 * hra.gradients * 3 // 4 == 2 * (866 * d * r * 4) * 3 // 4


def test_shards_are_those_of_the_first_process_and_padded() -> None:
    """LoRA's `A` has fewer rows than there are processes: each has one row at most, and all send as much."""
    hra, lora, _ = costs(adapted(wide(1024, 256), r=8), 64, "zero3")
    assert hra.vectors == 1024 * 8 * 4 // 64
    assert lora.vectors == (1024 + 256 * 8 // 64) * 4
    assert (hra.sent, lora.sent) == (3 * 63 * hra.vectors, 3 * 63 * lora.vectors)
    assert (hra.collectives, lora.collectives) == (3, 3)


def test_tensor_parallelism_sums_numbers_of_tokens_before_row_wise_layers() -> None:
    model = adapted(tiny_llama(), r=4, target_modules=["q_proj", "o_proj"])
    layers = [layer for layer in model.modules() if hasattr(layer, "hra_u")]
    blocks, d = len(layers) // 2, layers[0].hra_u.width
    hra, lora, _ = costs(model, 2, "tp", tokens=1000)
    assert (hra.collectives, lora.collectives) == (3 * blocks, 2 * blocks)
    assert hra.sent == blocks * (2 * 1000 * 4 + d * 4) * 4
    assert lora.sent == blocks * (1000 * 4 + d * 4) * 4
    assert (hra.vectors, hra.parameters) == (4 * hra.parameters, 2 * blocks * d * 4)
    outs = [layer.hra_base.shape[0] for layer in layers[:2]]
    assert lora.vectors == blocks * 4 * 4 * (d + outs[0] // 2 + d // 2 + outs[1]), (
        "half of B column-wise, of A row-wise"
    )


def test_a_model_without_a_plan_or_without_adapters() -> None:
    with pytest.raises(AdapterError, match=r"^Sequential has no plan for tensor parallelism \(`tp_plan`\)"):
        costs(adapted(wide(8, 8)), 2, "tp")
    with pytest.raises(AdapterError, match="has no adapters"):
        costs(wide(8, 8), 2, "ddp")
