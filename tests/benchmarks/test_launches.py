"""Launches: which events count, and what adapters launch per layer, against counts by hand and by a dispatch mode."""

from __future__ import annotations

import host
import launches
import pytest
from speed.models import WORKLOADS, linear
from speed.per_site import PerSite, per_site
from speed.setting import Setting


def test_lora_on_one_layer_launches_what_one_counts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "linear-16", linear(16))
    found = per_site(Setting("linear-16", "gradients", 4), ["lora"])
    # Forward: A, B, the scale, the sum. Backward: the scale, a product for A, for B and for each of their inputs, and
    # the sum of the gradients of the input.
    assert found.left_out == {}
    assert found.total("lora") == 10
    assert found.launches["lora"]["aten::mm"] == 6
    assert found.launches["lora"]["aten::mul"] == 2


def counted(**totals: float) -> PerSite:
    launched = {key.replace("_", "-"): {"aten::mm": total} for key, total in totals.items()}
    return PerSite(Setting("llama-64x12", "gradients", 16), 100, launched, {"PEFT OFT": "ValueError: no"})


def test_targets_are_met_up_to_their_limits() -> None:
    met, missed = launches.verdicts(counted(lora=10, ours=8, ours_gs=12.1))
    assert met == "- met: hra_fx / PEFT LoRA, Llama of 12 layers, r=8: 0.80; limit 0.80"
    assert missed.startswith("- **NOT met**: hra_fx, GS / PEFT LoRA") and missed.endswith("1.21; limit 1.20")
    assert all(line.startswith("- not measured") for line in launches.verdicts(counted(lora=10)))


# ---- functions of hra_fx that a training step passes; the times themselves are in no test ----


def test_an_adapted_linear_and_the_batch_pass_few_functions() -> None:
    inside, outside = host.frames(host.adapted_model().train())
    assert inside < 6.1, "in each layer; the first ones ask which side is cheaper"
    assert outside < 3, "in the batch, for each layer"


def test_transform_and_load_adapter_walk_over_a_model_few_times() -> None:
    transformed, loaded = host.walks_of_transform_and_load()
    assert transformed <= 3 and loaded <= 4
