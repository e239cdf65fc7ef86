"""What hra_fx reads of DeepSpeed's parameters. DeepSpeed is on the path of the process that is started here only."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from canaries.canary import DEEPSPEED, canary

PROGRAM = """
import warnings
warnings.simplefilter("ignore")  # DeepSpeed's own
import deepspeed, torch
from torch import distributed, nn
from hra_fx.layers.partitioned import comes_and_goes, full_shape, is_partitioned

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
config = {"train_batch_size": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32):
    layer = nn.Linear(6, 4)
assert layer.weight.numel() == 0
assert is_partitioned(layer) and full_shape(layer.weight) == (4, 6)
assert comes_and_goes(layer.weight)
with deepspeed.zero.GatheredParameters(layer.weight):
    assert not any(full_shape(tensor) != tensor.shape for tensor in [layer.weight])
    assert comes_and_goes(layer.weight), "whole for now"
"""
#: What a launcher sets.
ONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@pytest.mark.slow
@canary(
    "deepspeed",
    "`ds_shape` and `ds_persist` of a parameter that ZeRO-3 partitions",
    reader="hra_fx/layers/partitioned.py",
    breaks="adapters in models that ZeRO-3 partitions",
)
def test_partitioned_parameters() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        **{"capture_output": True, "text": True, "timeout": 400},
        env={**os.environ, **ONE, "PYTHONPATH": os.pathsep.join([DEEPSPEED, *sys.path])},
    )
    assert done.returncode == 0, done.stderr
